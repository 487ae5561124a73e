//! Text to token IDs and back: every golden of the reference, and what must hold for any text.

use serde_json::Value;

use crate::support::{TOKENIZERS, goldens, ids, tokenizer};
use bora_common::conversation::{Conversation, ConversationOptions, DataUrls};
use bora_common::tokenizer::{IncrementalDecoder, Tokenizer, TokenizerError, TokenizerFormat};

#[test]
fn every_text_golden_is_met() {
    let goldens: Vec<Value> = ["golden_texts.jsonl", "random_texts.jsonl"].into_iter().flat_map(goldens).collect();
    assert!(goldens.len() >= 380);
    for golden in goldens {
        let text = golden["text"].as_str().expect("text");
        for name in TOKENIZERS {
            let tokenizer = tokenizer(name);
            let encoded = tokenizer.encode(text);
            assert_eq!(encoded, ids(&golden[name]), "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&encoded, true), text, "{name}");
            assert_eq!(tokenizer.decode(&encoded, false), text, "{name}");
        }
    }
}

#[test]
fn facts_of_the_vocabulary() {
    let tokenizer = tokenizer("tekken-v13.json");
    assert_eq!(tokenizer.vocabulary_size(), 131_072);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), 2));
    assert_eq!(tokenizer.special_name(32), Some("[ARGS]"));
    assert_eq!(tokenizer.special_name(999), Some("<SPECIAL_999>"));
    assert_eq!(tokenizer.special_id("[TOOL_CALLS]"), Some(9));
    assert_eq!(tokenizer.token_bytes(1097), Some(&b"a"[..]));
    assert_eq!(tokenizer.token_bytes(9), None);
    assert_eq!(tokenizer.token_bytes(131_072), None);
    assert_eq!(tokenizer.token_bytes(u32::MAX), None);
    assert!(tokenizer.is_special(0) && !tokenizer.is_special(1000) && !tokenizer.is_special(u32::MAX));
    assert_eq!(tokenizer.decode(&[1, 3, u32::MAX, 22177, 4], false), "<s>[INST]Hello[/INST]");
    assert_eq!(tokenizer.decode(&[1, 3, u32::MAX, 22177, 4], true), "Hello");
}

/// Python: `bytes.decode(errors="replace")` of the same bytes.
#[test]
fn invalid_bytes_become_replacement_characters_as_in_python() {
    let tokenizer = tokenizer("tekken-v13-8k.json");
    let cases: [(&[u8], &str); 8] = [
        (b"\xff", "\u{fffd}"),
        (b"a\xe2\x82", "a\u{fffd}"),
        (b"\xe2\x82a", "\u{fffd}a"),
        (b"\xe2\x82\xac", "\u{20ac}"),
        (b"\xf0\x9f\x98\xf0\x9f\x98\x80", "\u{fffd}\u{1f600}"),
        (b"\xc0\xaf", "\u{fffd}\u{fffd}"),
        (b"\xed\xa0\x80", "\u{fffd}\u{fffd}\u{fffd}"),
        (b"\xf4\x90\x80\x80x", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}x"),
    ];
    for (bytes, expected) in cases {
        let ids: Vec<u32> = bytes.iter().map(|byte| 1000 + u32::from(*byte)).collect();
        assert_eq!(tokenizer.decode(&ids, true), expected, "{bytes:x?}");
        let mut decoder = IncrementalDecoder::new(tokenizer.clone(), true);
        let mut text: String = ids.iter().map(|id| decoder.push(*id)).collect();
        text.push_str(&decoder.finish());
        assert_eq!(text, expected, "{bytes:x?}");
    }
}

#[test]
fn a_character_is_never_split_and_comes_with_its_last_byte() {
    let tokenizer = tokenizer("tekken-v13-8k.json");
    let mut decoder = IncrementalDecoder::new(tokenizer, true);
    let chunks: Vec<String> = "a\u{1f30d}".bytes().map(|byte| decoder.push(1000 + u32::from(byte))).collect();
    assert_eq!(chunks, ["a", "", "", "", "\u{1f30d}"]);
    assert_eq!(decoder.finish(), "");
    assert_eq!(decoder.push(1000 + 0xF0), "");
    assert_eq!(decoder.push(2), "\u{fffd}", "a special id ends what was incomplete");
}

/// A `tokenizer.json` of the byte-level kind, small enough to be written here.
#[test]
fn a_hugging_face_file_is_read() {
    let file = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": 13, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "vocab": {"h": 0, "i": 1, "Ġ": 2, "hi": 3, "Ġhi": 4, "Ã": 5, "©": 6, "<": 7, "|": 8, ">": 9, "e": 10, "n": 11, "d": 12},
            "merges": [["h", "i"], ["Ġ", "hi"]],
        },
    });
    let folder = tempfile::tempdir().expect("folder");
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).expect("file");
    let missing = Tokenizer::from_dir(folder.path()).expect_err("nothing says what ends a text");
    assert!(missing.to_string().contains("end-of-text"), "{missing}");

    let config = r#"{"eos_token": {"content": "<|end|>"}}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("file");
    let tokenizer = Tokenizer::from_dir(folder.path()).expect("tokenizer");
    assert_eq!(tokenizer.format(), TokenizerFormat::HuggingFace);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (None, 13));
    assert_eq!(tokenizer.encode("hi hi\u{e9}"), [3, 4, 5, 6]);
    assert_eq!(tokenizer.encode("<|end|>"), [7, 8, 10, 11, 12, 8, 9], "a special token's name is plain text");
    assert_eq!(tokenizer.token_bytes(4), Some(&b" hi"[..]));
    assert_eq!(tokenizer.token_bytes(5), Some(&b"\xc3"[..]));
    assert_eq!(tokenizer.decode(&[3, 4, 5, 6, 13], true), "hi hi\u{e9}");
    assert_eq!(tokenizer.decode(&[3, 13], false), "hi<|end|>");
    let messages = serde_json::json!([{"role": "user", "content": "hi"}]);
    let conversation = Conversation::parse(&messages, None, ConversationOptions::default()).expect("valid");
    let refused = conversation.encode(&tokenizer, &DataUrls).expect_err("no layout");
    assert_eq!(refused.code(), "unsupported_tokenizer");
}

#[test]
fn files_that_are_no_tokenizer_are_refused_with_a_reason() {
    let folder = tempfile::tempdir().expect("folder");
    assert!(matches!(Tokenizer::from_dir(folder.path()), Err(TokenizerError::Missing(_))));
    let path = folder.path().join("tekken.json");
    let config =
        r#""config": {"pattern": "x", "default_vocab_size": 300, "default_num_special_tokens": 20, "version": "v13"}"#;
    for (text, reason) in [
        ("".to_owned(), "EOF"),
        ("{}".to_owned(), "neither"),
        (format!("{{{config}, \"vocab\": []}}"), "config asks for 280"),
        (format!("{{{config}, \"vocab\": 3}}"), "invalid type"),
        (r#"{"model": {"type": "BPE"}}"#.to_owned(), ""),
    ] {
        std::fs::write(&path, &text).expect("file");
        let error = Tokenizer::from_file(&path).expect_err(&text).to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}
