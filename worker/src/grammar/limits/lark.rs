//! Bounds on the expansion of a Lark grammar's terminals.
//!
//! llguidance expands a terminal wherever another terminal names it, so `A: B B`, `B: C C`, … doubles with every line;
//! it follows names by recursion. This module reads the tokens of a grammar, sums up the expansion of each terminal,
//! and bounds the depth of the recursion. It does not parse the syntax: the compiler refuses malformed grammars. Rules
//! are not expanded.

use std::collections::HashMap;
use std::str::Chars;

use serde_json::{Deserializer, Value};

use super::{Counted, GrammarError, at_most};

/// Maximum definitions of a grammar plus nested brackets within each of them: the compiler recurses through both.
const MAX_LEVELS: usize = 4_000;
/// Maximum bytes of all texts of `%regex`, each of which becomes an automaton of its substrings.
const MAX_SUBSTRING_BYTES: usize = 16 * 1024;
/// Literal bytes per node.
const LITERAL_BYTES: usize = 31;
/// Nodes per case-insensitive character.
const NODES_OF_CASELESS: usize = 8;
/// Nodes per byte of `%regex`: its states and transitions.
const NODES_OF_SUBSTRING_BYTE: usize = 6;

/// Counts a grammar with its regular expressions and schemas.
pub(super) fn check(text: &str, counted: &mut Counted) -> Result<(), GrammarError> {
    let tokens = tokens(text)?;
    let mut definitions = definitions(&tokens, counted)?;
    let levels = definitions.iter().map(|definition| 1 + definition.nesting).sum();
    at_most("definitions and nested brackets", levels, MAX_LEVELS)?;
    let names: HashMap<&str, Vec<usize>> = definitions.iter().enumerate().filter(|(_, d)| d.is_terminal).fold(
        HashMap::new(),
        |mut names, (index, definition)| {
            names.entry(definition.name).or_default().push(index);
            names
        },
    );
    expand_terminals(&mut definitions, &names)?;
    for definition in &definitions {
        // the regular expressions in it are already counted
        let mut nodes = definition.nodes - definition.counted;
        if !definition.is_terminal && definition.expands {
            nodes = definition
                .references
                .iter()
                .fold(nodes, |nodes, name| nodes.saturating_add(weight(&definitions, &names, name)));
        }
        counted.expand(nodes)?;
    }
    Ok(())
}

/// Adds to each terminal the expansion of the terminals that it names.
fn expand_terminals(definitions: &mut [Definition<'_>], names: &HashMap<&str, Vec<usize>>) -> Result<(), GrammarError> {
    let mut state = vec![Expanding::New; definitions.len()];
    for root in 0..definitions.len() {
        let mut stack = vec![root];
        while let Some(index) = stack.last().copied() {
            if !definitions[index].is_terminal || state[index] == Expanding::Done {
                stack.pop();
                continue;
            }
            let named = definitions[index].references.iter().filter_map(|name| names.get(name)).flatten().copied();
            if state[index] == Expanding::New {
                state[index] = Expanding::Begun;
                for other in named {
                    match state[other] {
                        Expanding::New => stack.push(other),
                        Expanding::Begun => {
                            let reason = format!("the terminal {} refers to itself", definitions[other].name);
                            return Err(GrammarError(reason));
                        }
                        Expanding::Done => {}
                    }
                }
                continue;
            }
            let nodes = definitions[index]
                .references
                .iter()
                .fold(definitions[index].nodes, |nodes, name| nodes.saturating_add(weight(definitions, names, name)));
            definitions[index].nodes = nodes;
            state[index] = Expanding::Done;
            stack.pop();
        }
    }
    Ok(())
}

/// Nodes of all terminals with this name; a nested grammar may define the name too.
fn weight(definitions: &[Definition<'_>], names: &HashMap<&str, Vec<usize>>, name: &str) -> u64 {
    let indices = names.get(name).into_iter().flatten();
    indices.fold(0, |nodes: u64, index| nodes.saturating_add(definitions[*index].nodes))
}

#[derive(Clone, Copy, PartialEq)]
enum Expanding {
    New,
    Begun,
    Done,
}

/// A rule, a terminal, or the tokens outside of both.
#[derive(Default)]
struct Definition<'a> {
    name: &'a str,
    is_terminal: bool,
    /// Whether the rule is expanded like a terminal.
    expands: bool,
    /// Nodes of the definition itself, later of its whole expansion.
    nodes: u64,
    /// Nodes of regular expressions among them.
    counted: u64,
    nesting: usize,
    references: Vec<&'a str>,
}

/// Splits the tokens into definitions and counts the regular expressions and schemas in them.
fn definitions<'a>(tokens: &[Token<'a>], counted: &mut Counted) -> Result<Vec<Definition<'a>>, GrammarError> {
    let mut definitions = vec![Definition { is_terminal: true, ..Definition::default() }];
    let mut depth = 0_usize;
    let mut substring_bytes = 0;
    let mut begins = true;
    for (index, token) in tokens.iter().enumerate() {
        if begins
            && let Token::Name(name) = token
            && let Some(colon) = header_length(&tokens[index..])
        {
            depth = 0;
            definitions.push(Definition {
                name,
                is_terminal: is_terminal(name),
                // a rule with attributes is a terminal
                expands: tokens[index..index + colon].contains(&Token::Open('[')),
                ..Definition::default()
            });
            begins = false;
            continue;
        }
        begins = matches!(token, Token::Newline)
            || (*token == Token::Open('{') && index > 0 && tokens[index - 1] == Token::NestedLark);
        let Some(definition) = definitions.last_mut() else { continue };
        let nodes = match token {
            Token::Newline | Token::NestedLark => 0,
            Token::Name(name) => {
                definition.references.push(*name);
                1
            }
            Token::Text { bytes, caseless: false } => 1 + bytes / LITERAL_BYTES,
            Token::Text { bytes, caseless: true } => 1 + NODES_OF_CASELESS * bytes,
            Token::Regex(pattern) => {
                let nodes = counted.regex(pattern)?;
                definition.counted += nodes;
                nodes as usize
            }
            Token::Schema(schema) => {
                counted.schema(schema)?;
                1
            }
            Token::Substrings(bytes) => {
                substring_bytes += bytes;
                at_most("bytes in all texts of `%regex`", substring_bytes, MAX_SUBSTRING_BYTES)?;
                1 + NODES_OF_SUBSTRING_BYTE * bytes
            }
            Token::Open(_) => {
                depth += 1;
                definition.nesting = definition.nesting.max(depth);
                1
            }
            Token::Close => {
                depth = depth.saturating_sub(1);
                0
            }
            Token::Sign('~') => {
                definition.expands = true;
                2
            }
            Token::Sign(_) => 2,
        };
        definition.nodes = definition.nodes.saturating_add(nodes as u64);
    }
    Ok(definitions)
}

/// Number of tokens up to the colon of a definition; `None` if the tokens are no definition.
fn header_length(tokens: &[Token<'_>]) -> Option<usize> {
    let end = tokens.iter().position(|token| matches!(token, Token::Sign(':') | Token::Newline))?;
    (tokens[end] == Token::Sign(':')).then_some(end)
}

fn is_terminal(name: &str) -> bool {
    name.trim_start_matches('_').starts_with(|first: char| first.is_ascii_uppercase())
}

#[derive(Debug, PartialEq)]
enum Token<'a> {
    Newline,
    Name(&'a str),
    Text {
        bytes: usize,
        caseless: bool,
    },
    Regex(String),
    Schema(Value),
    /// Bytes of a `%regex`.
    Substrings(usize),
    /// `%lark`
    NestedLark,
    Open(char),
    Close,
    Sign(char),
}

/// Splits a grammar into tokens, like llguidance.
fn tokens(text: &str) -> Result<Vec<Token<'_>>, GrammarError> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        match first {
            ' ' | '\t' | '\r' => {}
            '\n' => tokens.push(Token::Newline),
            '#' => length = line_length(rest),
            '/' if rest.starts_with("//") => length = line_length(rest),
            '"' => {
                let closing = quoted_length(rest, '"')?;
                let caseless = rest[closing..].starts_with('i');
                tokens.push(Token::Text { bytes: closing - 2, caseless });
                length = closing + usize::from(caseless);
            }
            '/' => {
                let closing = quoted_length(rest, '/')?;
                let flags = rest[closing..].chars().take_while(|flag| "imslux".contains(*flag)).count();
                length = closing + flags;
                let flags = &rest[closing..length];
                let pattern = &rest[1..closing - 1];
                tokens.push(Token::Regex(if flags.is_empty() {
                    pattern.to_owned()
                } else {
                    format!("(?{flags}){pattern}")
                }));
            }
            '<' => {
                // a special token; its name has neither brackets nor whitespace
                let name = rest[1..].find(|c: char| c == '<' || c == '>' || c.is_whitespace());
                let Some(name) = name.filter(|end| rest[1 + end..].starts_with('>')) else {
                    return Err(GrammarError("it has a `<` without a `>`".into()));
                };
                length = name + 2;
                tokens.push(Token::Sign('<'));
            }
            '%' => {
                let (token, keyword_length) = keyword(rest)?;
                tokens.push(token);
                length = keyword_length;
            }
            '(' | '[' | '{' => tokens.push(Token::Open(first)),
            ')' | ']' | '}' => tokens.push(Token::Close),
            ':' if rest.starts_with("::") => {
                length = 2;
                tokens.push(Token::Sign('='));
            }
            _ => match name_length(rest) {
                Some(name) => {
                    length = name;
                    tokens.push(Token::Name(rest[..name].trim_start_matches(['!', '?'])));
                }
                None => tokens.push(Token::Sign(if first == ':' { ':' } else { sign(first) })),
            },
        }
        rest = &rest[length..];
    }
    Ok(tokens)
}

fn sign(character: char) -> char {
    if character == '~' { '~' } else { '.' }
}

fn line_length(text: &str) -> usize {
    text.find('\n').unwrap_or(text.len())
}

/// Bytes of a quoted text, with both quotation marks.
fn quoted_length(text: &str, mark: char) -> Result<usize, GrammarError> {
    let mut escaped = false;
    for (index, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == mark => return Ok(index + 1),
            _ => {}
        }
    }
    Err(GrammarError(format!("it has a `{mark}` that is not closed")))
}

/// Length of a rule's name with its modifiers, or of a terminal's name.
fn name_length(text: &str) -> Option<usize> {
    let mut rest = text.strip_prefix('!').unwrap_or(text);
    let marked = rest.len() < text.len();
    if let Some(behind) = rest.strip_prefix(['_', '?']) {
        let first_is_good = |first: char| first.is_ascii_lowercase() || (first.is_ascii_uppercase() && !marked);
        if !behind.starts_with(first_is_good)
            || (rest.starts_with('?') && !behind.starts_with(|c: char| c.is_ascii_lowercase()))
        {
            return None;
        }
        rest = behind;
    }
    let mut characters: Chars<'_> = rest.chars();
    let first = characters.next()?;
    let lower = first.is_ascii_lowercase();
    if !lower && (!first.is_ascii_uppercase() || marked) {
        return None;
    }
    let continues = |c: char| {
        c == '_'
            || c == '-'
            || c.is_ascii_digit()
            || if lower { c.is_ascii_lowercase() } else { c.is_ascii_uppercase() }
    };
    let length = 1 + characters.take_while(|c| continues(*c)).count();
    Some(text.len() - rest.len() + length)
}

/// A keyword that begins with `%`, and its length in bytes.
fn keyword(text: &str) -> Result<(Token<'_>, usize), GrammarError> {
    for (keyword, is_schema) in [("%json", true), ("%regex", false), ("%llguidance", false)] {
        let Some(behind) = text.strip_prefix(keyword) else { continue };
        let mut values = Deserializer::from_str(behind).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => return Err(GrammarError(format!("{keyword}: it is no JSON: {error}"))),
            None => return Err(GrammarError(format!("{keyword}: its JSON is missing"))),
        };
        let length = keyword.len() + values.byte_offset();
        let token = if is_schema { Token::Schema(value) } else { Token::Substrings(length - keyword.len()) };
        return Ok((token, length));
    }
    if text.starts_with("%lark") {
        return Ok((Token::NestedLark, "%lark".len()));
    }
    let word = text[1..].chars().take_while(char::is_ascii_lowercase).count();
    Ok((Token::Sign('%'), 1 + word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        let GrammarError(reason) = check(text, &mut Counted::default()).expect_err(&text[..text.len().min(80)]);
        reason
    }

    fn chain(levels: usize, line: impl Fn(usize) -> String, end: &str) -> String {
        let lines: Vec<String> = (0..levels).map(line).collect();
        format!("start: T0\n{}\nT{levels}: {end}\n", lines.join("\n"))
    }

    #[test]
    fn rejects_terminals_that_multiply() {
        for hostile in [
            chain(40, |level| format!("T{level}: T{0} T{0}", level + 1), "\"a\""),
            chain(40, |level| format!("T{level}: T{0} \"b\" | \"c\" T{0}", level + 1), "\"a\""),
            chain(40, |level| format!("T{level}: (T{0} | \"b\") & ~(T{0} \"c\")", level + 1), "/a/"),
            chain(5, |level| format!("T{level}: {}", vec![format!("T{}", level + 1); 30].join(" ")), "\"a\""),
            // in one line, after comments, texts and regular expressions that look like other tokens
            chain(40, |level| format!("T{level}: T{0} /\\/\\/\"#/ T{0} // T: \"", level + 1), "\"#\""),
            chain(40, |level| format!("T{level}:\"\\\"//\" T{0} T{0}", level + 1), "\"a\""),
            // a rule with attributes is expanded
            format!(
                "{}\nr[max_tokens=5]: {}\n",
                chain(12, |level| format!("T{level}: T{0} T{0}", level + 1), "\"a\""),
                "T0 ".repeat(100)
            ),
            // within a nested grammar, and beside one that has terminals of the same names
            format!("start: %lark {{ {} }}\n", chain(40, |level| format!("T{level}: T{0} T{0}", level + 1), "\"a\"")),
            format!(
                "start: /[^\"]/i %json {{\"const\": \"T0: T1\"}}\n{}",
                chain(40, |level| format!("T{level}: T{0} T{0}", level + 1), "\"a\"").replace("start", "other")
            ),
            format!("start: {}", "\"abcdefghijklmnopqrstuvwxyz\"i ".repeat(2_000)),
            format!("start: {}", (0..60).map(|n| format!("/[\\w--{}]/ ", (b'0' + n) as char)).collect::<String>()),
        ] {
            let reason = refusal(&hostile);
            assert!(reason.contains("expand to more than"), "{reason}: {}", &hostile[..hostile.len().min(80)]);
        }
    }

    #[test]
    fn rejects_deep_recursion() {
        assert!(refusal(&chain(5_000, |level| format!("T{level}: T{}", level + 1), "\"a\"")).contains("definitions"));
        let rules: String = (0..5_000).map(|level| format!("r{level}: r{} \"a\"\n", level + 1)).collect();
        assert!(refusal(&format!("start: r0\n{rules}")).contains("definitions"));
        let nested: String =
            (0..200).map(|level| format!("r{level}: {}\"a\"{}\n", "(".repeat(25), ")".repeat(25))).collect();
        assert!(refusal(&format!("start: r0\n{nested}")).contains("definitions"));
        assert!(refusal("start: A\nA: B\nB: \"b\" A\n").contains("refers to itself"));
        assert!(
            refusal(&format!("start: %regex {{\"substring_chars\": \"{}\"}}", "a".repeat(20_000))).contains("%regex")
        );
    }

    #[test]
    fn allows_common_grammars() {
        let choices: Vec<String> = (0..4_000).map(|number| format!("\"choice {number}\"")).collect();
        for fine in [
            format!("start: {}", choices.join(" | ")),
            chain(8, |level| format!("T{level}: T{0} T{0}", level + 1), "\"a\""),
            "%import common.WORD\n%import common (INT, WS)\n%ignore WS\nstart: (WORD | INT)+ // words\n".to_owned(),
            "?start: sum\n?sum: product | sum \"+\" product -> add\n?product: atom\n!atom.2: NUMBER | \"(\" sum \")\"\nNUMBER: /[0-9]+/\n".to_owned(),
            format!("start: {}\nWORD: /\\w+/\n", "WORD ".repeat(1_000)),
            "start: <[9]> \"add\" <[32]> a\na: %json {\"type\": \"object\"}\n".to_owned(),
            "start: text[suffix=\"END\"] \ntext: /(?s:.*)/".to_owned(),
        ] {
            assert_eq!(check(&fine, &mut Counted::default()), Ok(()), "{fine}");
        }
    }

    #[test]
    fn splits_tokens_like_the_compiler() {
        let names = |text: &str| -> Vec<String> {
            let name = |token: &Token<'_>| if let Token::Name(name) = token { Some((*name).to_owned()) } else { None };
            tokens(text).unwrap().iter().filter_map(name).collect()
        };
        assert_eq!(names("?a: !b _C d?E _f \"X\" // Y\n%ignore Z"), ["a", "b", "_C", "d", "E", "_f", "Z"]);
        assert_eq!(names("a /[^\\/\"]/i B \"\\\"#\"i C <[1-2]> D <|X|> @g-H"), ["a", "B", "C", "D", "g-", "H"]);
        assert_eq!(names("a: A~2..3 B{2,3} C*D"), ["a", "A", "B", "C", "D"]);
    }
}
