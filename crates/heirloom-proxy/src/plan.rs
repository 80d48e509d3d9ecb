//! How many loops, connections and pipes there are to be, by the configuration and by the limit on descriptors.

use std::num::NonZeroUsize;

use crate::config::Config;
use crate::error::EngineError;

/// Descriptors that are no connections' and no pipes': control socket, listeners, logs.
const RESERVE: usize = 64;
/// Pipes without which too many connections would have to wait for each other.
const FEWEST_PIPES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) threads: usize,
    pub(crate) connections: usize,
    /// Of each loop.
    pub(crate) pipes: usize,
}

impl Plan {
    pub(crate) fn new(config: &Config, limit: usize) -> Result<Plan, EngineError> {
        let threads =
            config.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
        let free = limit.saturating_sub(RESERVE + config.listeners.len() + 3 * threads);
        // Two sockets for each connection, and two ends of a pipe for every other one.
        let connections = config.max_connections.unwrap_or(free / 3).max(1);
        let needed = 2 * connections + 2 * FEWEST_PIPES;
        if needed > free {
            return Err(EngineError::Descriptors { connections, needed: needed + limit - free, limit });
        }
        let pipes = (free - 2 * connections) / 2;
        Ok(Plan { threads, connections, pipes: (pipes / threads).max(1) })
    }
}

impl Config {
    /// Whether there are enough descriptors for it if a process may have `limit` of them; one that may have fewer does not start.
    ///
    /// ```
    /// use heirloom_proxy::Config;
    ///
    /// let config = "max_connections = 5000\nlistener = [{ listen = ':80', to = ['127.0.0.1:7'] }]";
    /// let config = Config::parse(config, "web.toml")?;
    /// assert!(config.fits(20_000).is_ok());
    /// assert!(config.fits(1024).unwrap_err().to_string().contains("1024"));
    /// # Ok::<_, heirloom_proxy::config::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`EngineError::Descriptors`] says how many it needs.
    pub fn fits(&self, limit: u64) -> Result<(), EngineError> {
        Plan::new(self, limit.try_into().unwrap_or(usize::MAX)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(threads: usize, max_connections: Option<usize>) -> Config {
        Config {
            threads: NonZeroUsize::new(threads),
            pin_threads: false,
            max_connections,
            drain: None,
            access_log: None,
            listeners: Vec::new(),
            pools: Vec::new(),
        }
    }

    #[test]
    fn everything_fits_into_the_limit() {
        for (limit, threads, connections) in [(20_000, 2, None), (20_000, 4, Some(8000)), (1024, 1, None)] {
            let plan = Plan::new(&config(threads, connections), limit).unwrap();
            assert_eq!(plan.threads, threads);
            assert!(connections.is_none_or(|asked| asked == plan.connections));
            let all = RESERVE + 2 * plan.connections + 2 * plan.pipes * threads;
            assert!(all <= limit && all > limit - 20 - 2 * threads, "{plan:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_that_says_how_much_is_needed() {
        let error = Plan::new(&config(2, Some(10_000)), 20_000).unwrap_err();
        let EngineError::Descriptors { needed, .. } = error else { panic!("{error}") };
        assert!(Plan::new(&config(2, Some(10_000)), needed).is_ok());
        assert!(Plan::new(&config(2, Some(10_000)), needed - 1).is_err());
    }
}
