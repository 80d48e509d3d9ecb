//! The proxy on a machine where everything waits long for a processor: whoever asks is answered all the same.

mod support;

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use support::echo::{Caller, Echo, Pattern};
use support::proxy::{Handover, Proxy};
use support::random::Random;

/// How many threads that never sleep there are for each processor. Each handover gives way to others a few times, with what
/// is done at length in between; a client waits 5 seconds for its answer.
const FOR_EACH_PROCESSOR: usize = 40;

#[test]
fn handovers_come_about_while_every_processor_has_forty_threads_that_never_sleep() {
    let echo = Echo::tcp("echo");
    let mut proxy = Proxy::to(echo.address());
    let pattern = Pattern::new(&mut Random::seeded());
    let mut caller = Caller::connect(&proxy.address(), &pattern).expect("it is let in");
    let load = Load::start(FOR_EACH_PROCESSOR);
    for how in [Handover::Upgrade, Handover::InPlace, Handover::Reload, Handover::Refused] {
        proxy.hand_over(how);
        caller.exchange(1000);
    }
    drop(load);
    caller.hang_up(1000);
    proxy.finish();
}

/// Threads that never sleep, until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(for_each_processor: usize) -> Load {
        let processors = thread::available_parallelism().expect("processors").get();
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..processors * for_each_processor).map(|_| {
            let stop = stop.clone();
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    spin_loop();
                }
            })
        });
        Load { threads: threads.collect(), stop }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
