//! The shares of tenants in a bounded queue.
//!
//! A queue with room accepts every entry. In a full queue each waiting tenant has an equal share. A tenant below its
//! share gets in and displaces the newest entry of the tenant that holds the most.

/// Returns the number of entries of a full queue that each of `tenants` may hold.
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
