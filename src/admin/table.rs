//! Listings as tables for people.

use serde_json::Value;

/// The groups: name, model, state and load.
pub(super) fn groups(groups: &Value) -> String {
    let mut rows = vec![row(["GROUP", "MODEL", "STATE", "RUNNING", "WAITING", "ENDPOINT", "VERSION"])];
    for group in groups.as_array().into_iter().flatten() {
        let load = &group["load"];
        rows.push(vec![
            text(&group["group"]),
            text(&group["model"]),
            text(&group["state"]),
            text(&load["running"]),
            text(&load["waiting"]),
            text(&group["endpoint"]),
            text(&group["version"]),
        ]);
    }
    render(&rows)
}

/// The open requests, the oldest first.
pub(super) fn requests(requests: &Value) -> String {
    let mut rows = vec![row(["REQUEST", "TENANT", "MODEL", "GROUP", "SECONDS", "PROMPT", "OUTPUT"])];
    for request in requests.as_array().into_iter().flatten() {
        rows.push(vec![
            text(&request["request_id"]),
            text(&request["tenant"]),
            text(&request["model"]),
            text(&request["group"]),
            request["age_seconds"].as_f64().map_or_else(|| "-".into(), |seconds| format!("{seconds:.1}")),
            text(&request["prompt_tokens"]),
            text(&request["completion_tokens"]),
        ]);
    }
    render(&rows)
}

fn row<const N: usize>(names: [&str; N]) -> Vec<String> {
    names.map(str::to_owned).into()
}

/// A value in a cell. What a client chose (a request's name) can't move the terminal's cursor.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
        other => other.to_string(),
    }
}

/// Columns as wide as their widest cell.
fn render(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_cells_and_control_characters_are_shown() {
        let listed = json!([{
            "request_id": "a\u{1b}[2J", "tenant": "team", "model": "m", "group": null,
            "age_seconds": 1.25, "prompt_tokens": 10, "completion_tokens": 0,
        }]);
        let table = requests(&listed);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "REQUEST  TENANT  MODEL  GROUP  SECONDS  PROMPT  OUTPUT");
        assert_eq!(lines[1], "a?[2J    team    m      -      1.2      10      0");
    }
}
