//! Compiles `bora/v1/*.proto` with protox, so that no protoc is needed on the machine.

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["bora/v1/identity.proto", "bora/v1/inference.proto", "bora/v1/peers.proto", "bora/v1/admin.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // gRPC reflection serves the same descriptors
    std::fs::write(out.join("bora.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".bora.v1.Image.data")
        .bytes(".bora.v1.Step.encoded")
        .bytes(".bora.v1.Snapshot.block_hashes")
        .bytes(".bora.v1.BlocksChanged")
        .compile_fds(descriptors)?;
    Ok(())
}
