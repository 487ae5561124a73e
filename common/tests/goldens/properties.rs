//! What must hold for any text and any token IDs, tried on seeded random ones.

use std::time::{Duration, Instant};

use bora_common::conversation::{Delta, ToolCallParser};
use bora_common::tokenizer::IncrementalDecoder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{TOKENIZERS, tokenizer};

const FRAGMENTS: [&str; 40] = [
    "'s",
    "'LL",
    "\r\n",
    "\n\n",
    "  ",
    "\t\t",
    "///",
    "/\n",
    "...",
    "don't",
    "CamelCase",
    "snake_case",
    "ABCdef",
    "123",
    "é",
    "e\u{301}",
    "ﬁ",
    "½",
    "日本語",
    "한국어",
    "नमस्ते",
    "👨‍👩‍👧‍👦",
    "🇫🇷",
    "ǅ",
    "ʰ",
    "٣٤٥",
    "ⅷ",
    "İ",
    "[INST]",
    "</s>",
    "\0",
    "\u{85}",
    "\u{2028}",
    "\u{a0}",
    "\u{3000}",
    "\u{200b}",
    "\u{feff}",
    "    ",
    "𝒳",
    "\u{10ffff}",
];

fn random_text(random: &mut StdRng) -> String {
    let length = random.random_range(0..60);
    match random.random_range(0..4) {
        0 => (0..length).map(|_| FRAGMENTS[random.random_range(0..FRAGMENTS.len())]).collect(),
        1 => (0..length).map(|_| random.random::<char>()).collect(),
        2 => (0..length).map(|_| char::from(random.random_range(0..128u8))).collect(),
        _ => FRAGMENTS[random.random_range(0..FRAGMENTS.len())].repeat(length),
    }
}

#[test]
fn decoding_gives_back_any_text() {
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..2000 {
        let text = random_text(&mut random);
        for name in TOKENIZERS {
            let tokenizer = tokenizer(name);
            let ids = tokenizer.encode(&text);
            assert_eq!(tokenizer.decode(&ids, true), text, "{name}");
            assert!(ids.iter().all(|id| tokenizer.token_bytes(*id).is_some()), "{name}: {text:?}");
            assert_eq!(tokenizer.encode(&text), ids, "{name}: a second time");
        }
    }
}

#[test]
fn any_ids_decode_the_same_at_once_and_one_by_one() {
    let mut random = StdRng::seed_from_u64(2);
    let tokenizer = tokenizer("tekken-v13-8k.json");
    for _ in 0..2000 {
        let ids: Vec<u32> = (0..random.random_range(0..40))
            .map(|_| match random.random_range(0..4) {
                0 => random.random_range(0..40),
                1 => random.random_range(1000..1256),
                2 => random.random_range(0..9192),
                _ => random.random(),
            })
            .collect();
        for skip_special in [true, false] {
            let mut decoder = IncrementalDecoder::new(tokenizer.clone(), skip_special);
            let mut text: String = ids.iter().map(|id| decoder.push(*id)).collect();
            text.push_str(&decoder.finish());
            assert_eq!(text, tokenizer.decode(&ids, skip_special), "{ids:?}");
        }
    }
}

/// Whatever is generated: calls have names and arguments, no text is lost, and no marker comes out.
#[test]
fn any_ids_parse_as_an_output() {
    let mut random = StdRng::seed_from_u64(3);
    let tokenizer = tokenizer("tekken-v13-8k.json");
    let chunks: Vec<Vec<u32>> = ["f", "{}", "{\"a\": \"é\"}", "{", "}", " ", "text", "[1"]
        .iter()
        .map(|text| tokenizer.encode(text))
        .chain([vec![9], vec![32], vec![10], vec![33], vec![1240]])
        .chain(
            ["{}", " {\"a\": [1]}\n", "{\"é\": \"[ARGS]\"}"]
                .map(|arguments| [vec![9, 1102, 32], tokenizer.encode(arguments)].concat()),
        )
        .collect();
    let (mut parsed, mut failed) = (0, 0);
    for round in 0..5000 {
        let ids: Vec<u32> =
            (0..random.random_range(0..9)).flat_map(|_| chunks[random.random_range(0..chunks.len())].clone()).collect();
        let mut parser = ToolCallParser::new(tokenizer.clone());
        let mut deltas: Vec<Delta> = ids.iter().flat_map(|id| parser.push(*id)).collect();
        let is_cut = round % 2 == 0;
        deltas.extend(parser.finish(is_cut));

        let mut text = String::new();
        let mut calls: Vec<(String, String)> = Vec::new();
        let mut ended = 0;
        for delta in deltas {
            match delta {
                Delta::Content(more) => text.push_str(&more),
                Delta::CallStart { index, name } => {
                    assert_eq!((index, ended), (calls.len(), calls.len()));
                    assert!(!name.is_empty());
                    text.push_str(&name);
                    calls.push((name, String::new()));
                }
                Delta::Arguments { index, text: more } => {
                    text.push_str(&more);
                    calls[index].1.push_str(&more);
                }
                Delta::CallEnd { index } => {
                    assert_eq!(index + 1, calls.len());
                    ended += 1;
                }
            }
        }
        assert!(ended == calls.len() || is_cut && ended + 1 == calls.len(), "{ids:?}");
        // white space aside, `{}` for nothing and a name or an ID that is dropped: every character is there, in its order
        let visible = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
        let whole = visible(&tokenizer.decode(&ids, true));
        if !ids.contains(&33) && !is_cut && calls.iter().all(|(_, arguments)| arguments != "{}") {
            assert_eq!(visible(&text), whole, "{ids:?}");
        }
        assert!(!text.replace("\"[ARGS]\"", "").contains("[ARGS]") && !text.contains("[TOOL_CALLS]"), "{ids:?}");
        if parser.error().is_some() {
            failed += 1;
            continue;
        }
        let is_object = |arguments: &str| serde_json::from_str::<serde_json::Map<_, _>>(arguments).is_ok();
        assert!(calls[..ended].iter().all(|(_, arguments)| is_object(arguments)), "{ids:?}");
        parsed += usize::from(!calls.is_empty());
    }
    assert!(parsed > 100 && failed > 100, "{parsed} parsed, {failed} failed");
}

/// Inputs that make a careless splitter or merger quadratic: a mebibyte each must stay far from that.
#[test]
fn pathological_texts_take_linear_time() {
    let tokenizer = tokenizer("tekken-v13.json");
    let mut random = StdRng::seed_from_u64(4);
    tokenizer.encode("warm");
    let size = 1 << 20;
    let texts = [
        "a".repeat(size),
        " ".repeat(size),
        "\n".repeat(size),
        " ".repeat(size) + "a",
        "-".repeat(size),
        "0".repeat(size),
        "\u{301}".repeat(size / 2),
        "漢".repeat(size / 3),
        " \n".repeat(size / 2),
        (0..size / 4).map(|_| random.random::<char>()).collect(),
        (0..size).map(|_| char::from(random.random_range(b'a'..=b'z'))).collect(),
    ];
    for text in texts {
        let start = Instant::now();
        let ids = tokenizer.encode(&text);
        let elapsed = start.elapsed();
        let beginning: String = text.chars().take(8).collect();
        assert!(elapsed < Duration::from_secs(20), "{beginning:?}...: {elapsed:?}");
        assert_eq!(tokenizer.decode(&ids, true), text, "{beginning:?}...");
    }
}

#[test]
fn threads_share_a_tokenizer() {
    let tokenizer = tokenizer("tekken-v13.json");
    let texts: Vec<String> = (0..64).map(|seed| random_text(&mut StdRng::seed_from_u64(seed))).collect();
    let expected: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.encode(text)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (text, ids) in texts.iter().zip(&expected) {
                    assert_eq!(&tokenizer.encode(text), ids);
                }
            });
        }
    });
}
