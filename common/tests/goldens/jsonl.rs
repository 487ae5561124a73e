//! Requests in, token IDs out: what `bora tokenize` writes.

use bora_common::conversation::jsonl;
use serde_json::{Value, json};

use crate::support::{fixture, goldens, tokenizer};

fn run(input: &str) -> Vec<Value> {
    let mut output = Vec::new();
    jsonl::run(&tokenizer("tekken-v13-8k.json"), Some(&fixture("images")), input.as_bytes(), &mut output)
        .expect("runs");
    String::from_utf8(output).expect("text").lines().map(|line| serde_json::from_str(line).expect("json")).collect()
}

#[test]
fn goldens_come_out_line_by_line() {
    let goldens: Vec<Value> = goldens("golden_encodings.jsonl")
        .into_iter()
        .filter(|golden| golden["tokenizer"] == "tekken-v13-8k.json" && golden.get("token_ids").is_some())
        .collect();
    let input: String = goldens.iter().map(|golden| format!("{}\n", golden["request"])).collect();
    let output = run(&input);
    assert_eq!(output.len(), goldens.len());
    for (line, golden) in output.iter().zip(&goldens) {
        assert_eq!(line["token_ids"], golden["token_ids"], "{}", golden["name"]);
    }
}

#[test]
fn mistakes_come_out_as_openai_errors() {
    let input = concat!(
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"video\"}]}]}\n",
        "\n",
        "not json\n",
        "[]\n",
        "{}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": \"ftp://x/y\"}]}]}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}",
    );
    let output = run(input);
    let params: Vec<&Value> = output.iter().map(|line| &line["error"]["param"]).collect();
    let expected = ["messages[0].content[0].type", "", "", "messages", "messages[0].content[0].image_url"];
    assert_eq!(params[..5], expected.map(Value::from).iter().collect::<Vec<_>>()[..]);
    assert!(
        output[..5]
            .iter()
            .all(|line| line["error"]["type"] == "invalid_request_error" && line["error"]["code"].is_string())
    );
    let hi = tokenizer("tekken-v13-8k.json").encode("hi");
    let expected = json!({"token_ids": ([vec![1, 3], hi, vec![4]].concat())});
    assert_eq!(output[5], expected, "the last line needs no line break");
}
