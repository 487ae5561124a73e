//! Metrics as text (OpenMetrics and Prometheus' own form), read back: for `bora top`, and for the way to an OTLP
//! collector. Only what this project writes needs to be understood, and what is not understood is left out.

/// All samples of one metric.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Family {
    /// Without `_total`, `_bucket`, `_sum` and `_count`.
    pub name: String,
    /// `counter`, `gauge`, `histogram` or whatever else was said.
    pub kind: String,
    /// What it is.
    pub help: String,
    /// Its samples in order.
    pub samples: Vec<Sample>,
}

/// One line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// What stands behind the family's name: empty, `_total`, `_bucket`, `_sum`, `_count`.
    pub suffix: String,
    /// Names and values.
    pub labels: Vec<(String, String)>,
    /// The number.
    pub value: f64,
}

impl Sample {
    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Reads a whole text.
pub fn parse(text: &str) -> Vec<Family> {
    let mut families: Vec<Family> = Vec::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (Some(what), Some(name)) = (words.next(), words.next()) else { continue };
            let said = words.next().unwrap_or_default();
            if families.last().is_none_or(|family| family.name != name) {
                families.push(Family { name: name.to_owned(), ..Family::default() });
            }
            let Some(family) = families.last_mut() else { continue };
            match what {
                "TYPE" => said.clone_into(&mut family.kind),
                "HELP" => said.clone_into(&mut family.help),
                _ => {}
            }
        } else if let Some((name, sample)) = parse_sample(line) {
            let known = families.last_mut().filter(|family| name.starts_with(family.name.as_str()));
            let suffix = known.as_ref().map(|family| &name[family.name.len()..]);
            match (known, suffix) {
                (Some(family), Some(suffix @ ("" | "_total" | "_bucket" | "_sum" | "_count" | "_info"))) => {
                    family.samples.push(Sample { suffix: suffix.to_owned(), ..sample });
                }
                _ => families.push(Family { name: name.to_owned(), samples: vec![sample], ..Family::default() }),
            }
        }
    }
    families
}

fn parse_sample(line: &str) -> Option<(&str, Sample)> {
    let end_of_name = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end_of_name);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inner) => parse_labels(inner)?,
        None => (Vec::new(), rest),
    };
    // a time stamp and an exemplar may follow
    let value = rest.split_whitespace().next()?.parse().ok()?;
    (!name.is_empty()).then_some((name, Sample { suffix: String::new(), labels, value }))
}

type Labels = Vec<(String, String)>;

/// From behind the opening brace to behind the closing one.
fn parse_labels(mut rest: &str) -> Option<(Labels, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(behind) = rest.strip_prefix('}') {
            return Some((labels, behind));
        }
        let (key, quoted) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.push((key.to_owned(), value));
        rest = &quoted[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_library_writes_is_read_back() {
        let text = "# HELP a_requests HTTP requests.\n# TYPE a_requests counter\n\
            a_requests_total{endpoint=\"chat\",path=\"C:\\\\x \\\"y\\\"\\n\"} 3\n\
            # HELP a_seconds How long.\n# TYPE a_seconds histogram\n# UNIT a_seconds seconds\n\
            a_seconds_sum 1.5\na_seconds_count 2\na_seconds_bucket{le=\"0.5\"} 1 # {trace_id=\"ab\"} 0.4\n\
            a_seconds_bucket{le=\"+Inf\"} 2\nplain 7 1700000000\nnonsense{\n# EOF\n";
        let families = parse(text);
        let by_name = |name: &str| families.iter().find(|family| family.name == name).unwrap();
        let requests = by_name("a_requests");
        assert_eq!((requests.kind.as_str(), requests.help.as_str()), ("counter", "HTTP requests."));
        assert_eq!(requests.samples[0].suffix, "_total");
        assert_eq!(requests.samples[0].label("path"), Some("C:\\x \"y\"\n"));
        let seconds = by_name("a_seconds");
        assert_eq!(seconds.samples.len(), 4);
        assert_eq!(seconds.samples[2].label("le"), Some("0.5"));
        assert_eq!((seconds.samples[2].value, seconds.samples[3].value), (1.0, 2.0));
        assert_eq!(by_name("plain").samples[0].value, 7.0);
        assert!(!families.iter().any(|family| family.name.starts_with("nonsense")));
    }
}
