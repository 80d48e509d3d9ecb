//! A command's man page: what clap knows of it, and what its [`Page`] says.

use std::io;

use clap::ArgAction;
use clap::builder::Resettable;
use clap_mangen::Man;
use roff::{Roff, bold, roman};

use crate::page::Page;

/// The page of a built command in the language of troff. `related` are the pages that it refers to, `heirloom-chat(1)`
/// for instance.
pub(super) fn render(command: &clap::Command, page: &Page, related: &[String]) -> io::Result<Vec<u8>> {
    let version = format!("heirloom {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(prepare(command)).source(version).manual("Heirloom");
    // No hyphens that are not in the text: options and paths are to be copied.
    let mut text = b".nr HY 0\n".to_vec();
    man.render(&mut text)?;
    text.extend(sections(page, related).to_roff().into_bytes());
    Ok(text)
}

/// The command with what clap_mangen leaves out: the values in the synopsis, and other names of options. The text for
/// the long help is left out, since it comes in sections of its own.
fn prepare(command: &clap::Command) -> clap::Command {
    let usage = synopsis(command);
    command.clone().after_long_help(Resettable::Reset).override_usage(usage).mut_args(|option| {
        let aliases = option.get_visible_aliases().unwrap_or_default();
        if aliases.is_empty() {
            return option;
        }
        let label = if aliases.len() == 1 { "alias" } else { "aliases" };
        let aliases: Vec<String> = aliases.iter().map(|alias| format!("--{alias}")).collect();
        let help = option.get_long_help().or(option.get_help()).map(ToString::to_string).unwrap_or_default();
        option.help(format!("{help} [{label}: {}]", aliases.join(", ")))
    })
}

/// How the command is called, option by option.
fn synopsis(command: &clap::Command) -> String {
    let mut usage = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let mut shown: Vec<_> = command.get_arguments().filter(|argument| !argument.is_hide_set()).collect();
    // The command's own, then those that all commands have.
    shown.sort_by_key(|argument| (argument.is_positional(), argument.is_global_set()));
    for argument in shown {
        let name = match (argument.get_long(), argument.get_short()) {
            (Some(long), _) => Some(format!("--{long}")),
            (None, short) => short.map(|short| format!("-{short}")),
        };
        let name = name.or_else(|| argument.is_last_set().then(|| "--".to_owned()));
        let takes_values = argument.get_num_args().is_some_and(|count| count.takes_values());
        let values = argument.get_value_names().filter(|_| takes_values).unwrap_or_default();
        let parts: Vec<&str> =
            name.as_deref().into_iter().chain(values.iter().map(|value| value.as_str())).collect();
        let several = argument.is_positional() && matches!(argument.get_action(), ArgAction::Append);
        let parts = parts.join(" ") + if several { "..." } else { "" };
        usage += &if argument.is_required_set() { format!(" {parts}") } else { format!(" [{parts}]") };
    }
    if command.has_subcommands() {
        usage += " COMMAND";
    }
    usage
}

fn sections(page: &Page, related: &[String]) -> Roff {
    let mut roff = Roff::new();
    for section in page.sections() {
        roff.control("SH", [section.title.to_uppercase().as_str()]);
        for (term, text) in section.items {
            roff.control("TP", []);
            roff.text([bold(term)]);
            roff.text([roman(text)]);
        }
    }
    if !related.is_empty() {
        roff.control("SH", ["SEE ALSO"]);
        roff.text([roman(related.join(", "))]);
    }
    roff
}
