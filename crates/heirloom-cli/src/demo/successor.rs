//! A successor that goes as far as it can without committing, and then waits to be killed: everything is in its hands,
//! the incumbent is frozen, and yet nothing may be lost.

use std::io::Write;
use std::path::PathBuf;

use anyhow::anyhow;
use heirloom::{Config, NoRequests, Replace, Service, Start};

use crate::exit::Exit;
use crate::failure::Failure;

/// The options of the successor that is killed.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// The incumbent's control socket
    #[arg(long)]
    control: PathBuf,
    /// The service that it is to take over
    #[arg(long)]
    service: String,
}

/// Says `frozen` when the incumbent is, and waits.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    let service = Service::new(args.service);
    let started = heirloom::start::<NoRequests>(&args.control, service, Config::default(), Replace::Must)?;
    let Start::Successor(successor) = started else {
        return Err(anyhow!("the incumbent speaks an older protocol").into());
    };
    let complete = successor.receive()?.ready()?;
    writeln!(std::io::stdout(), "frozen")?;
    loop {
        std::thread::park();
        // Parking may end without a reason; what is held must stay held until the kill.
        let _held = &complete;
    }
}
