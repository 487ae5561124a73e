//! Text to ids and back: every golden of the reference, and what must hold for any text.

use crate::support::{TOKENIZERS, goldens, ids, tokenizer};
use bora_common::tokenizer::IncrementalDecoder;

#[test]
fn every_text_golden_is_met() {
    let goldens = goldens("golden_texts.jsonl");
    assert!(goldens.len() >= 30);
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
    assert!(
        tokenizer.is_special(0) && !tokenizer.is_special(1000) && !tokenizer.is_special(u32::MAX)
    );
    assert_eq!(
        tokenizer.decode(&[1, 3, u32::MAX, 22177, 4], false),
        "<s>[INST]Hello[/INST]"
    );
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
    let pieces: Vec<String> = "a\u{1f30d}"
        .bytes()
        .map(|byte| decoder.push(1000 + u32::from(byte)))
        .collect();
    assert_eq!(pieces, ["a", "", "", "", "\u{1f30d}"]);
    assert_eq!(decoder.finish(), "");
    assert_eq!(decoder.push(1000 + 0xF0), "");
    assert_eq!(
        decoder.push(2),
        "\u{fffd}",
        "a special id ends what was incomplete"
    );
}
