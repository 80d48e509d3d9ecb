//! The proxy that serves.

use anyhow::{Context, anyhow};
use heirloom::{NoRequests, Service, Start};
use heirloom_proxy::config::Config;

use super::Args;
use crate::exit::Exit;
use crate::failure::Failure;

/// Runs until the proxy is replaced, stopped, or fails.
pub(super) fn serve(_config: Config, args: &Args) -> Result<Exit, Failure> {
    heirloom::descriptors::raise_limit().context("cannot raise the limit on open files")?;
    let settings = heirloom::Config { force: args.force(), ..heirloom::Config::default() };
    match heirloom::start::<NoRequests>(&args.control()?, Service::new("proxy"), settings, args.replace())? {
        Start::Preflight(preflight) => preflight.refuse(NOT_THERE)?,
        _ => return Err(anyhow!(NOT_THERE).into()),
    }
    Ok(Exit::Done)
}

const NOT_THERE: &str = "serving is not there yet";
