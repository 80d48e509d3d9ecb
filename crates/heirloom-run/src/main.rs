//! The program `heirloom-run`: what `heirloom run` is, alone and with few dependencies, for the place of PID 1.
#![forbid(unsafe_code)]

mod arguments;
mod log;

use std::process::ExitCode;

use arguments::Asked;
use heirloom_run::exit;

fn main() -> ExitCode {
    log::start();
    match arguments::read(std::env::args_os()) {
        Ok(Asked::Run(options)) => match heirloom_run::run(*options) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                tracing::error!("{error}");
                ExitCode::from(error.code())
            }
        },
        Ok(Asked::Print(text)) => match std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(exit::RUN_FAILED),
        },
        Err(error) => {
            log::say(&format!("heirloom-run: {error}; see heirloom-run --help\n"));
            ExitCode::from(arguments::USAGE)
        }
    }
}
