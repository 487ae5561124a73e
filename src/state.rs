//! What `bora serve` keeps from run to run: the cluster secret of a cluster of one process.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bora_common::secret::ClusterKeys;

/// Its name within the state directory.
const SECRET_FILE: &str = "cluster-secret";

/// The keys of a server that was given no cluster secret: those of its state directory, whose secret is made at the first start.
pub(crate) fn cluster_keys(directory: Option<PathBuf>) -> anyhow::Result<ClusterKeys> {
    let is_given = directory.is_some();
    let Some(directory) = directory.or_else(default_directory) else {
        tracing::warn!(
            "no state directory is known (HOME is not set): the cluster secret lasts as long as this process"
        );
        return Ok(ClusterKeys::random());
    };
    let path = directory.join(SECRET_FILE);
    if let Some(keys) = read(&path)? {
        return Ok(keys);
    }
    match create(&directory, &path) {
        Ok(()) => {}
        // another process was faster
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if is_given => return Err(error).with_context(|| format!("--state-dir: {}", path.display())),
        // the cache ends with the process too
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "no state is kept: the cluster secret lasts as long as this process");
            return Ok(ClusterKeys::random());
        }
    }
    read(&path)?.with_context(|| format!("{}: the file is gone again", path.display()))
}

/// As the XDG base directory specification says.
fn default_directory() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(base.join("bora"))
}

/// The keys of a secret that is there. A link is not followed, and a file that is not this user's alone is refused.
fn read(path: &Path) -> anyhow::Result<Option<ClusterKeys>> {
    // a pipe would be waited for without O_NONBLOCK
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            bail!("{}: this is a link, expected a file of the cluster secret", path.display())
        }
        Err(error) => return Err(error).with_context(|| format!("{}: the cluster secret", path.display())),
    };
    check_owner(&file).with_context(|| format!("{}: the cluster secret", path.display()))?;
    let keys = ClusterKeys::read_open(file).with_context(|| format!("{}: the cluster secret", path.display()))?;
    Ok(Some(keys))
}

fn check_owner(file: &File) -> anyhow::Result<()> {
    let metadata = file.metadata()?;
    // belongs to the effective user; if there is no /proc the mode has to do
    if let Ok(process) = std::fs::metadata("/proc/self")
        && process.uid() != metadata.uid()
    {
        bail!("the file belongs to user {}, this process runs as {}", metadata.uid(), process.uid());
    }
    if metadata.mode() & 0o077 != 0 {
        bail!("mode {:04o} lets others read or change it; use `chmod 600`", metadata.mode() & 0o7777);
    }
    Ok(())
}

/// Makes a secret: whole and with mode 0600 from the moment on that its name is there. A file of that name is left as it is.
fn create(directory: &Path, path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut file = tempfile::Builder::new().prefix(".cluster-secret-").tempfile_in(directory)?;
    file.write_all(ClusterKeys::new_secret().as_bytes())?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn id(directory: &Path) -> anyhow::Result<String> {
        Ok(cluster_keys(Some(directory.into()))?.cache_key_id().to_owned())
    }

    #[test]
    fn keeps_one_secret_of_mode_0600() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("deep/state");
        let first = id(&state).unwrap();
        assert_eq!(id(&state).unwrap(), first, "the same at the next start");
        let file = std::fs::metadata(state.join(SECRET_FILE)).unwrap();
        assert_eq!(file.permissions().mode() & 0o7777, 0o600);
        assert_eq!(std::fs::metadata(&state).unwrap().permissions().mode() & 0o7777, 0o700);
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1, "nothing else is left");
        assert_ne!(id(&directory.path().join("other")).unwrap(), first);
    }

    #[test]
    fn processes_that_start_at_once_agree() {
        let directory = tempfile::tempdir().unwrap();
        let ids: Vec<String> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| id(directory.path()).unwrap())).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|one| *one == ids[0]), "{ids:?}");
    }

    #[test]
    fn rejects_links_and_files_that_others_can_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(SECRET_FILE);
        let elsewhere = directory.path().join("elsewhere");
        // also one that leads nowhere: nothing is made where it points
        symlink(&elsewhere, &path).unwrap();
        assert!(id(directory.path()).unwrap_err().to_string().contains("this is a link"));
        assert!(!elsewhere.exists());
        std::fs::remove_file(&path).unwrap();
        let first = id(directory.path()).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o666] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = format!("{:#}", id(directory.path()).unwrap_err());
            assert!(error.contains("chmod 600") && error.contains(&format!("{mode:04o}")), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(id(directory.path()).unwrap(), first);
        std::fs::write(&path, "short").unwrap();
        assert!(format!("{:#}", id(directory.path()).unwrap_err()).contains("at least 32 bytes"), "never replaced");
    }
}
