//! How many rows of fresh prompts a step has beside rows that decode. A row costs more the further into its prompt it stands,
//! because it attends to all before it: so there is room for a cost, not for a number of rows.

/// Rows of a prompt that gets on, however far it is.
const ROWS_MIN: usize = 16;
/// Above this a position or a number of rows makes no difference: no model and no step has so many.
const MOST: usize = 1 << 24;

/// What the prompts of a step that also decodes may cost together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptsBeside {
    /// In rows at the beginning of a prompt.
    pub rows: usize,
    /// The position at which a row costs twice as much as at the beginning.
    pub doubling: usize,
}

impl PromptsBeside {
    /// As many as fit into a step.
    pub const ALL: PromptsBeside = PromptsBeside { rows: usize::MAX, doubling: usize::MAX };

    /// Rows from `position` on that cost no more than this: the largest n with n + Σ (position + i) / doubling ≤ rows, or the
    /// few that every prompt gets.
    pub fn rows_from(&self, position: usize) -> usize {
        if self.rows >= MOST {
            return usize::MAX;
        }
        if self.doubling >= MOST {
            return self.rows;
        }
        let [rows, doubling, position] = [self.rows, self.doubling.max(1), position].map(|n| n.min(MOST) as u64);
        let slope = 2 * (doubling + position) - 1;
        let fit = ((slope * slope + 8 * rows * doubling).isqrt() - slope) / 2;
        (fit as usize).max(self.rows.min(ROWS_MIN))
    }

    /// What is left after so many rows from `position` on.
    pub(crate) fn less(self, rows: usize, position: usize) -> PromptsBeside {
        if self.rows >= MOST {
            return self;
        }
        let further = rows as u64 * position as u64 + rows as u64 * (rows as u64).saturating_sub(1) / 2;
        let cost = rows as u64 + further / self.doubling.max(1) as u64;
        PromptsBeside { rows: (self.rows as u64).saturating_sub(cost) as usize, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(rows: usize, position: usize, doubling: usize) -> f64 {
        (position..position + rows).map(|at| 1.0 + at as f64 / doubling as f64).sum()
    }

    /// No fewer rows than cost as much, and no more.
    #[test]
    fn rows_cost_what_there_is() {
        for (rows, doubling, position) in [(100, 1000, 0), (100, 1000, 4000), (512, 37, 90), (600, MOST / 2, 131_000)] {
            let fit = PromptsBeside { rows, doubling }.rows_from(position);
            let most = rows as f64 + 1e-6;
            assert!(cost(fit + 1, position, doubling) > most, "{fit} of {rows} at {position}");
            assert!(cost(fit, position, doubling) <= most || fit == ROWS_MIN, "{fit} of {rows} at {position}");
        }
        assert_eq!(PromptsBeside { rows: 100, doubling: usize::MAX }.rows_from(5), 100);
        assert_eq!(PromptsBeside { rows: 100, doubling: 1 }.rows_from(usize::MAX), ROWS_MIN);
        assert_eq!(PromptsBeside { rows: 3, doubling: 1 }.rows_from(usize::MAX), 3);
        assert_eq!(PromptsBeside::ALL.rows_from(usize::MAX), usize::MAX);
    }

    #[test]
    fn rows_taken_are_gone() {
        let room = PromptsBeside { rows: 100, doubling: 1000 };
        assert_eq!(room.less(40, 0).rows, 60);
        assert_eq!(room.less(40, 1000).rows, 20);
        assert_eq!(room.less(room.rows_from(4000) + 1, 4000).rows_from(0), 0);
        assert_eq!(PromptsBeside::ALL.less(1 << 20, 1 << 20), PromptsBeside::ALL);
    }
}
