//! Stop strings, found in decoded text across token boundaries.
//!
//! Text that may be the beginning of a stop string is held back until it is known not to be one.

/// Looks for stop strings in text that comes in chunks.
pub struct StopMatcher {
    stops: Vec<String>,
    keep_stop: bool,
    held: String,
    found: Option<usize>,
}

impl StopMatcher {
    /// `keep_stop`: the stop string itself is part of the output.
    pub fn new(stops: Vec<String>, keep_stop: bool) -> Self {
        Self { stops, keep_stop, held: String::new(), found: None }
    }

    /// Adds text; what is safe to show goes to `out`. Returns true when a stop string was found: then
    /// nothing that follows counts.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(number, stop)| self.held.find(stop.as_str()).map(|at| (at, at + stop.len(), number)))
            .min();
        if let Some((start, end, number)) = found {
            self.found = Some(number);
            out.push_str(&self.held[..if self.keep_stop { end } else { start }]);
            self.held.clear();
            return true;
        }
        let safe = self.held.len() - self.longest_beginning();
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// The stop string that was found.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|number| self.stops[number].as_str())
    }

    /// Text that passes by without being looked at (before `min_tokens`).
    pub fn pass(&mut self, text: &str, out: &mut String) {
        self.flush(out);
        out.push_str(text);
    }

    /// The text held back: no stop string will complete it.
    pub fn flush(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of the held text with which a stop string begins.
    fn longest_beginning(&self) -> usize {
        let mut longest = 0;
        for stop in &self.stops {
            let most = (stop.len() - 1).min(self.held.len());
            for length in (longest + 1..=most).rev() {
                if stop.is_char_boundary(length) && self.held.ends_with(&stop[..length]) {
                    longest = length;
                    break;
                }
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], keep: bool, chunks: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| stop.to_string()).collect(), keep);
        let mut shown = Vec::new();
        for chunk in chunks {
            let mut out = String::new();
            let stopped = matcher.push(chunk, &mut out);
            shown.push(out);
            if stopped {
                return (shown, true);
            }
        }
        let mut out = String::new();
        matcher.flush(&mut out);
        shown.push(out);
        (shown, false)
    }

    fn shown(chunks: &[&str]) -> Vec<String> {
        chunks.iter().map(|chunk| chunk.to_string()).collect()
    }

    #[test]
    fn a_stop_string_over_three_pieces_is_never_shown() {
        assert_eq!(run(&["END"], false, &["abE", "N", "Dxyz"]), (shown(&["ab", "", ""]), true));
        assert_eq!(run(&["END"], true, &["abE", "N", "Dxyz"]), (shown(&["ab", "", "END"]), true));
    }

    #[test]
    fn what_only_looked_like_one_is_shown_as_soon_as_it_is_clear() {
        assert_eq!(run(&["END"], false, &["E", "N", "x"]), (shown(&["", "", "ENx", ""]), false));
        assert_eq!(run(&["aab"], false, &["aa", "a", "b"]), (shown(&["", "a", ""]), true));
        assert_eq!(run(&["END"], false, &["xEN"]), (shown(&["x", "EN"]), false));
    }

    #[test]
    fn the_earliest_of_several_wins_and_characters_stay_whole() {
        assert_eq!(run(&["yz", "xy"], false, &["wxyz"]), (shown(&["w"]), true));
        assert_eq!(run(&["éè"], false, &["aé", "b"]), (shown(&["a", "éb", ""]), false));
        assert_eq!(run(&["éè"], false, &["aé", "è"]), (shown(&["a", ""]), true));
    }

    /// Any way of cutting the text gives the same output as the whole text at once.
    #[test]
    fn cuts_do_not_matter() {
        let text = "aabaacabäabab\n\nUser: x";
        let stops = ["abab", "\n\nUser:", "äc"];
        let whole: (String, bool) = {
            let (chunks, stopped) = run(&stops, false, &[text]);
            (chunks.concat(), stopped)
        };
        let boundaries: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        for first in &boundaries {
            for second in boundaries.iter().filter(|second| *second >= first) {
                let (chunks, stopped) =
                    run(&stops, false, &[&text[..*first], &text[*first..*second], &text[*second..]]);
                assert_eq!((chunks.concat(), stopped), whole, "{first} {second}");
            }
        }
    }
}
