//! Columns of text that stand under each other.

/// A table: its head, and rows of as many cells.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Table {
    pub(super) head: Vec<&'static str>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    /// Width of each column.
    pub(super) fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.chain([self.head[column].len()]).max().unwrap_or(0)
        };
        (0..self.head.len()).map(width).collect()
    }

    /// As lines, names to the left and numbers to the right.
    pub(super) fn text(&self) -> String {
        let widths = self.widths();
        let head: Vec<String> = self.head.iter().map(ToString::to_string).collect();
        let lines = std::iter::once(&head).chain(&self.rows).map(|row| {
            let cells = row.iter().zip(&widths).zip(&self.head).map(|((cell, width), name)| {
                if is_text(name) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// Whether a column holds names, not numbers.
pub(super) fn is_text(column: &str) -> bool {
    matches!(column, "GROUP" | "MODEL" | "STATE" | "DEVICE" | "HOST" | "VERSION" | "LINE")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let row = |cells: [&str; 2]| cells.map(String::from).to_vec();
        let table = Table { head: vec!["GROUP", "STEPS"], rows: vec![row(["a", "12345678"]), row(["longer", "1"])] };
        assert_eq!(table.text(), "GROUP      STEPS\na       12345678\nlonger         1");
        let empty = Table { head: vec!["GROUP"], rows: Vec::new() };
        assert_eq!(empty.text(), "GROUP");
    }
}
