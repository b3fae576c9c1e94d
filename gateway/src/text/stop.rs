//! Stop strings over a growing text: text is held back while it could begin a stop string.

/// The stop strings of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Stops {
    strings: Vec<String>,
    /// The stop string belongs to the answer (vLLM's `include_stop_str_in_output`).
    include: bool,
}

/// Which stop string ended the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stopped(pub String);

impl Stops {
    /// Empty strings never stop anything and are left out.
    pub(crate) fn new(strings: Vec<String>, include: bool) -> Stops {
        Stops { strings: strings.into_iter().filter(|s| !s.is_empty()).collect(), include }
    }

    pub(crate) fn strings(&self) -> &[String] {
        &self.strings
    }

    pub(crate) fn include(&self) -> bool {
        self.include
    }

    /// Looks at `held` (text not yet shown, all of it without a complete stop string before `new` was appended).
    /// Returns the text to show now, leaving in `held` what could still begin a stop string.
    pub(crate) fn take(&self, held: &mut String) -> (String, Option<Stopped>) {
        if let Some((start, end, stop)) = self.first(held) {
            let shown = held[..if self.include { end } else { start }].to_string();
            held.clear();
            return (shown, Some(Stopped(stop.to_string())));
        }
        let rest = held.split_off(held.len() - self.overlap(held));
        (std::mem::replace(held, rest), None)
    }

    /// The stop string that is complete first; among those that end together the longest.
    fn first(&self, text: &str) -> Option<(usize, usize, &str)> {
        let found = self.strings.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at, at + s.len(), s.as_str())));
        found.min_by_key(|&(start, end, _)| (end, start))
    }

    /// Length of the longest suffix of `text` that begins a stop string.
    fn overlap(&self, text: &str) -> usize {
        self.strings.iter().map(|stop| overlap(text, stop)).max().unwrap_or(0)
    }
}

fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    let lengths = (1..=longest).rev();
    lengths.into_iter().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &Stops, chunks: &[&str]) -> (Vec<String>, Option<String>) {
        let (mut held, mut shown) = (String::new(), Vec::new());
        for chunk in chunks {
            held.push_str(chunk);
            let (text, stopped) = stops.take(&mut held);
            shown.push(text);
            if let Some(Stopped(stop)) = stopped {
                return (shown, Some(stop));
            }
        }
        shown.push(held);
        (shown, None)
    }

    fn check(stops: &[&str], chunks: &[&str], shown: &[&str], stopped: Option<&str>) {
        let stops = Stops::new(stops.iter().map(|s| s.to_string()).collect(), false);
        let (texts, by) = run(&stops, chunks);
        assert_eq!(texts, shown);
        assert_eq!(by.as_deref(), stopped);
    }

    #[test]
    fn holds_back_what_could_begin_a_stop_string() {
        check(&["END"], &["a E", "N", "D b"], &["a ", "", ""], Some("END"));
        check(&["END"], &["a E", "N", "X"], &["a ", "", "ENX", ""], None);
        check(&["END"], &["a E"], &["a ", "E"], None);
        check(&["aab"], &["aa", "aab"], &["", "aa"], Some("aab"));
        check(&["\n\n"], &["x\n", "\ny"], &["x", ""], Some("\n\n"));
        check(&["bc", "abc"], &["xa", "bcd"], &["x", ""], Some("abc"));
        check(&["abcd", "bc"], &["abcd"], &["a"], Some("bc"));
        check(&["é!"], &["é", "?"], &["", "é?", ""], None);
        check(&[], &["x", "y"], &["x", "y", ""], None);
        check(&[""], &["x"], &["x", ""], None);
    }

    #[test]
    fn an_included_stop_string_ends_the_text() {
        let stops = Stops::new(vec!["END".into()], true);
        assert_eq!(run(&stops, &["a E", "ND b"]), (vec!["a ".into(), "END".into()], Some("END".into())));
    }

    proptest! {
        /// Whatever the chunks, the text shown never contains or ends with a visible beginning of the stop string that
        /// completes, and equals the text before it.
        #[test]
        fn chunks_do_not_matter(text in "[abé]{0,24}", cuts in prop::collection::vec(0usize..24, 0..6), stop in "[abé]{1,4}") {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&c| c <= text.len() && text.is_char_boundary(c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let (shown, stopped) = run(&Stops::new(vec![stop.clone()], false), &chunks);
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(shown.concat(), expected);
            prop_assert_eq!(stopped.is_some(), text.contains(&stop));
        }
    }
}
