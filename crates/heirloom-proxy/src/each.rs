//! Something of each side of a connection.

use std::ops::{Index, IndexMut};

use crate::id::Side;

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Each<T> {
    client: T,
    backend: T,
}

impl<T: Copy> Each<T> {
    /// The same for both.
    pub(crate) fn both(value: T) -> Each<T> {
        Each { client: value, backend: value }
    }
}

impl<T> Index<Side> for Each<T> {
    type Output = T;

    fn index(&self, side: Side) -> &T {
        match side {
            Side::Client => &self.client,
            Side::Backend => &self.backend,
        }
    }
}

impl<T> IndexMut<Side> for Each<T> {
    fn index_mut(&mut self, side: Side) -> &mut T {
        match side {
            Side::Client => &mut self.client,
            Side::Backend => &mut self.backend,
        }
    }
}
