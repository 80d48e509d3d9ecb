//! What there is to say about a command beyond its options, written once for `--help` and for the man page.
//!
//! A command's [`Page`] lies in its module, beside its options. A command without one has help and a man page all
//! the same, of its options and of what all commands have in common.

use std::fmt::Write;

use crate::exit::Exit;
use crate::log;

/// A thing and what there is to say about it, in plain text; ASCII, so that every man(1) shows it.
pub(crate) type Item = (&'static str, &'static str);

/// The text about a command that its options do not say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// What it does and what is to be known about it: paragraphs with an empty line between them.
    pub(crate) description: &'static str,
    /// The exit codes that it can give.
    pub(crate) exits: &'static [Exit],
    /// The signals that it handles in a way of its own.
    pub(crate) signals: &'static [Item],
    /// The files that it uses.
    pub(crate) files: &'static [Item],
    /// The environment variables that it reads, besides those of the log.
    pub(crate) environment: &'static [Item],
    /// Command lines, and what they do.
    pub(crate) examples: &'static [Item],
    /// Other man pages, besides `heirloom(1)`.
    pub(crate) see_also: &'static [&'static str],
}

/// A part of a page: its title and what it lists.
pub(crate) struct Section {
    pub(crate) title: &'static str,
    pub(crate) items: Vec<(String, &'static str)>,
}

impl Page {
    /// Nothing to say beyond the options.
    pub(crate) const EMPTY: Page = Page {
        description: "",
        exits: &[],
        signals: &[],
        files: &[],
        environment: &[],
        examples: &[],
        see_also: &[],
    };

    /// Adds the text to a command's long help. Its short help stays short.
    pub(crate) fn attach(&self, command: clap::Command) -> clap::Command {
        let command = command.after_long_help(self.to_help());
        if self.description.is_empty() { command } else { command.long_about(self.description) }
    }

    /// Everything but the description and the references, in the order of man-pages(7); nothing that is empty.
    pub(crate) fn sections(&self) -> Vec<Section> {
        let list = |items: &[Item]| items.iter().map(|&(term, text)| (term.to_owned(), text)).collect();
        let exits = self.exits.iter().map(|exit| (exit.code().to_string(), exit.meaning())).collect();
        let environment = [self.environment, log::ENVIRONMENT].concat();
        let sections = [
            Section { title: "Exit status", items: exits },
            Section { title: "Signals", items: list(self.signals) },
            Section { title: "Environment", items: list(&environment) },
            Section { title: "Files", items: list(self.files) },
            Section { title: "Examples", items: list(self.examples) },
        ];
        sections.into_iter().filter(|section| !section.items.is_empty()).collect()
    }

    /// The sections as they look in `--help`.
    fn to_help(self) -> String {
        let mut help = String::new();
        for section in self.sections() {
            let _ = writeln!(help, "{}:", section.title);
            for (term, text) in section.items {
                // A number has its meaning beside it, anything longer below, as options have.
                let gap = if term.len() <= 2 { "  " } else { "\n          " };
                let _ = writeln!(help, "  {term}{gap}{text}");
            }
            help.push('\n');
        }
        help.truncate(help.trim_end().len());
        help
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_without_a_page_has_what_all_have_in_common() {
        let titles: Vec<_> = Page::EMPTY.sections().iter().map(|section| section.title).collect();
        assert_eq!(titles, ["Environment"]);
        let command = Page::EMPTY.attach(clap::Command::new("some").about("Does something"));
        assert!(command.get_long_about().is_none());
        assert!(command.get_after_long_help().unwrap().to_string().contains("HEIRLOOM_LOG"));
    }

    #[test]
    fn help_has_every_section_and_item() {
        let page = Page {
            exits: &[Exit::Done],
            signals: &[("SIGTERM", "Stops it.")],
            examples: &[("heirloom some", "Does something.")],
            ..Page::EMPTY
        };
        let help = page.to_help();
        assert!(help.starts_with("Exit status:\n  0  done"), "{help}");
        assert!(help.contains("\n\nSignals:\n  SIGTERM\n          Stops it.\n"), "{help}");
        assert!(help.ends_with("Examples:\n  heirloom some\n          Does something."), "{help}");
    }
}
