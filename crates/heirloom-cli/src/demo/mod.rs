//! The command `heirloom demo`.
pub(crate) mod server;
pub(crate) mod successor;
use crate::exit::Exit;
use crate::failure::Failure;
/// x
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {}
pub(crate) fn run(_: &Args) -> Result<Exit, Failure> {
    Ok(Exit::Done)
}
