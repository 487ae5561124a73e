//! The upstream call's messages on the wire. A request is little more than its token IDs, a quarter of a million
//! of them at most: they are packed where prompts are encoded (`encode::wire`), and copied here as they are. The
//! bytes are those of any other protobuf encoder.

use std::sync::Arc;

use bora_proto::v1::{GenerateEvent, GenerateRequest};
use bytes::BufMut as _;
use prost::Message as _;
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::{
    encode::wire::PackedIds,
    fleet::validate::{Violation, ViolationKind},
};

/// Field 2, length-delimited: `GenerateRequest.token_ids`.
const TOKEN_IDS_KEY: u8 = 2 << 3 | 2;

/// A request and its token IDs, which are packed already.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// Everything but the token IDs.
    pub request: GenerateRequest,
    /// The prompt's token IDs.
    pub prompt: PackedIds,
    /// The token IDs generated so far.
    pub generated: Vec<u8>,
}

/// The codec of `Inference.Generate`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GenerateCodec;

/// Its sending half.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RequestEncoder;

impl Codec for GenerateCodec {
    type Encode = Outgoing;
    type Decode = GenerateEvent;
    type Encoder = RequestEncoder;
    type Decoder = EventDecoder;

    fn encoder(&mut self) -> Self::Encoder {
        RequestEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        EventDecoder
    }
}

/// Its receiving half. What cannot be decoded is a violation of the contract, not a fault of the sequence.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EventDecoder;

impl Decoder for EventDecoder {
    type Item = GenerateEvent;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<GenerateEvent>, Status> {
        GenerateEvent::decode(buffer).map(Some).map_err(|error| {
            let mut status = Status::internal(error.to_string());
            status.set_source(Arc::new(Violation::new(ViolationKind::Malformed, "an event cannot be decoded")));
            status
        })
    }
}

impl Encoder for RequestEncoder {
    type Item = Outgoing;
    type Error = Status;

    fn encode(&mut self, outgoing: Outgoing, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let Outgoing { request, prompt, generated } = outgoing;
        let length = prompt.size() + generated.len();
        buffer.reserve(request.encoded_len() + length + 16);
        // what is missing of an empty list is nothing, as protobuf has it
        if length > 0 {
            buffer.put_u8(TOKEN_IDS_KEY);
            prost::encoding::encode_varint(length as u64, buffer);
            prompt.segments().iter().for_each(|segment| buffer.put_slice(segment));
            buffer.put_slice(&generated);
        }
        request.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }
}
