//! How tenants share a bounded queue.
//!
//! A queue with room takes everybody's entries. In a full one each tenant that waits has an equal share: who holds less
//! gets in, and the newest entry of who holds most makes room for it.

/// Entries of a full queue that each of `tenants` may hold.
pub(crate) fn share(capacity: usize, tenants: usize) -> usize {
    (capacity / tenants.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_and_never_nothing() {
        assert_eq!(share(10, 3), 3);
        assert_eq!(share(10, 0), 10);
        assert_eq!(share(2, 5), 1);
        assert_eq!(share(0, 1), 1);
    }
}
