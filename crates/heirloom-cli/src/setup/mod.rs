//! The command `heirloom setup`: installs man pages and completions, made from the command line's own definition.
//!
//! Each file is written beside its place and renamed, so that there is the old one or the new one, never a part.

mod man;

use std::env;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::ValueHint;
use clap_complete::aot::{Bash, Fish, Generator, Zsh, generate};
use rustix::process::geteuid;

use crate::exit::Exit;
use crate::failure::Failure;
use crate::page::Page;

/// The options of `heirloom setup`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Args {
    /// Install below this directory [default: /usr/local for root, ~/.local for others]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    prefix: Option<PathBuf>,
    /// Write one of them to stdout instead: bash, zsh, fish, or a man page such as heirloom-chat.1
    #[arg(long, value_name = "WHAT", value_hint = ValueHint::Other, value_parser = find, conflicts_with = "prefix")]
    print: Option<Document>,
}

/// What `--help` and the man page say beyond the options.
pub(crate) const PAGE: Page = Page {
    description: "\
Writes the man pages of the program and its commands, and completions for bash, zsh and fish, below DIR, and prints the \
path of each file. A file that is already there is replaced as a whole. To be run again after an upgrade.",
    exits: &[Exit::Done, Exit::Failed, Exit::Usage],
    environment: &[("HOME", "The ~ in the default of --prefix.")],
    files: &[
        ("DIR/share/man/man1/heirloom.1, heirloom-COMMAND.1", "The man pages."),
        ("DIR/share/bash-completion/completions/heirloom", "The completion for bash."),
        ("DIR/share/zsh/site-functions/_heirloom", "The completion for zsh."),
        ("DIR/share/fish/vendor_completions.d/heirloom.fish", "The completion for fish."),
    ],
    examples: &[
        ("heirloom setup", "Installs everything for oneself, or as root for all users."),
        ("heirloom setup | xargs -d '\\n' rm", "Removes it all again."),
        ("heirloom setup --print heirloom-chat.1 | man -l -", "Shows a page without installing it."),
    ],
    see_also: &["man(1)"],
    ..Page::EMPTY
};

/// One of the files that are installed.
#[derive(Clone, Debug)]
struct Document {
    /// What `--print` calls it.
    name: String,
    /// Where it belongs, below the prefix.
    path: PathBuf,
    text: Vec<u8>,
}

/// `heirloom setup`.
pub(crate) fn run(args: &Args) -> Result<Exit, Failure> {
    let mut stdout = io::stdout();
    if let Some(document) = &args.print {
        stdout.write_all(&document.text)?;
        return Ok(Exit::Done);
    }
    let prefix = match &args.prefix {
        Some(prefix) => prefix.clone(),
        None => default_prefix(geteuid().is_root(), env::var_os("HOME"))?,
    };
    for document in documents()? {
        let path = prefix.join(document.path);
        install(&path, &document.text).with_context(|| {
            format!("cannot write {}; --prefix chooses another directory", path.display())
        })?;
        writeln!(stdout, "{}", path.display())?;
    }
    Ok(Exit::Done)
}

/// Where files go that no package manager looks after.
fn default_prefix(is_root: bool, home: Option<OsString>) -> anyhow::Result<PathBuf> {
    if is_root {
        return Ok("/usr/local".into());
    }
    match home.map(PathBuf::from) {
        Some(home) if home.is_absolute() => Ok(home.join(".local")),
        _ => Err(anyhow!("HOME is not the path of a directory: set it, or say where with --prefix")),
    }
}

/// Writes a file as others may read it, whole or not at all.
fn install(path: &Path, text: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    // The umask takes from these permissions what the user does not want.
    let mut file = tempfile::Builder::new()
        .prefix(".heirloom-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)?;
    file.write_all(text)?;
    file.persist(path)?;
    Ok(())
}

/// The one with this name.
fn find(name: &str) -> anyhow::Result<Document> {
    let mut documents = documents()?;
    match documents.iter().position(|document| document.name == name) {
        Some(index) => Ok(documents.swap_remove(index)),
        None => {
            let names: Vec<String> = documents.into_iter().map(|document| document.name).collect();
            Err(anyhow!("there are: {}", names.join(", ")))
        }
    }
}

/// Everything that is installed.
fn documents() -> io::Result<Vec<Document>> {
    let mut documents = man_pages()?;
    documents.extend([
        completion(Bash, "bash", "share/bash-completion/completions/heirloom"),
        completion(Zsh, "zsh", "share/zsh/site-functions/_heirloom"),
        completion(Fish, "fish", "share/fish/vendor_completions.d/heirloom.fish"),
    ]);
    Ok(documents)
}

/// The program's page, and one for each of its commands.
fn man_pages() -> io::Result<Vec<Document>> {
    let mut program = shown().disable_help_subcommand(true);
    program.build();
    let document = |command: &clap::Command, page: &Page, related: Vec<String>| {
        let name = format!("{}.1", command.get_display_name().unwrap_or(command.get_name()));
        let text = man::render(command, page, &related)?;
        Ok(Document { path: Path::new("share/man/man1").join(&name), name, text })
    };
    let all =
        program.get_subcommands().map(|command| format!("heirloom-{}(1)", command.get_name())).collect();
    let program_page = document(&program, &crate::PAGE, all);
    let pages = program.get_subcommands().map(|command| {
        let page = crate::page_of(command.get_name());
        let related = ["heirloom(1)"].iter().chain(page.see_also).map(ToString::to_string).collect();
        document(command, page, related)
    });
    [program_page].into_iter().chain(pages).collect()
}

fn completion(shell: impl Generator, name: &str, path: &str) -> Document {
    let mut text = Vec::new();
    generate(shell, &mut shown(), "heirloom", &mut text);
    Document { name: name.to_owned(), path: path.into(), text }
}

/// The command line as people are to see it: without its hidden commands, which completions would offer.
fn shown() -> clap::Command {
    let whole = crate::command();
    let commands = whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    clap::Command::new("heirloom")
        .version(env!("CARGO_PKG_VERSION"))
        .about(whole.get_about().cloned().unwrap_or_default())
        .long_about(crate::PAGE.description)
        .args(whole.get_arguments().cloned())
        .groups(whole.get_groups().cloned())
        .subcommand_required(true)
        .subcommands(commands)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_installs_for_all_and_others_for_themselves() {
        let prefix = |is_root, home: Option<&str>| default_prefix(is_root, home.map(OsString::from));
        assert_eq!(prefix(true, Some("/root")).unwrap(), Path::new("/usr/local"));
        assert_eq!(prefix(false, Some("/home/me")).unwrap(), Path::new("/home/me/.local"));
        for home in [None, Some(""), Some("me")] {
            assert!(prefix(false, home).unwrap_err().to_string().contains("--prefix"));
        }
    }

    #[test]
    fn what_is_shown_is_the_program_without_its_hidden_commands() {
        let (whole, shown) = (crate::command(), shown());
        let names = |command: &clap::Command| -> Vec<String> {
            let visible = command.get_subcommands().filter(|command| !command.is_hide_set());
            visible.map(|command| command.get_name().to_owned()).collect()
        };
        assert_eq!(names(&shown), names(&whole));
        assert_eq!(shown.get_subcommands().count(), names(&whole).len());
        assert_eq!(shown.get_about().map(ToString::to_string), whole.get_about().map(ToString::to_string));
        shown.debug_assert();
    }
}
