//! Help, man pages and completions: they agree with each other and with the program, and their readers understand them.
//!
//! The list of commands is what `heirloom --help` prints, so that a new command is held to the same.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::*;

/// The sections that `--help` and man pages share, with the titles that they have in `--help`.
const SECTIONS: [&str; 5] = ["Exit status", "Signals", "Environment", "Files", "Examples"];

/// Runs it to a good end; what it wrote to stdout.
#[track_caller]
fn output(command: &mut Command) -> String {
    let mut process = Process::start(command);
    process.wait_for_code(0);
    String::from_utf8(process.stdout()).expect("UTF-8")
}

/// The commands that `heirloom --help` shows.
fn commands() -> Vec<String> {
    let help = output(heirloom().arg("--help"));
    let names: Vec<String> = terms(section(&help, "Commands")).map(first_word).collect();
    assert!(names.len() > 3 && names.contains(&"chat".to_owned()), "{names:?}");
    names.into_iter().filter(|name| name != "help").collect()
}

/// The long help of the program, for the name "", or of a command.
fn help(command: &str) -> String {
    output(heirloom().args((!command.is_empty()).then_some(command)).arg("--help"))
}

/// The man page of the program, for the name "", or of a command, as it is installed.
fn page(command: &str) -> String {
    output(heirloom().args(["setup", "--print", &page_name(command)]))
}

fn page_name(command: &str) -> String {
    if command.is_empty() { "heirloom.1".to_owned() } else { format!("heirloom-{command}.1") }
}

/// The program, as "", and its commands.
fn program_and_commands() -> Vec<String> {
    [String::new()].into_iter().chain(commands()).collect()
}

/// The lines of a section of `--help`; none if there is no such section.
fn section<'a>(help: &'a str, title: &str) -> Vec<&'a str> {
    let title = format!("{title}:");
    let lines = help.lines().skip_while(|line| *line != title).skip(1);
    lines.take_while(|line| line.is_empty() || line.starts_with(' ')).collect()
}

/// What a section of `--help` lists: its lines that are indented by two columns.
fn terms(lines: Vec<&str>) -> impl Iterator<Item = &str> {
    lines.into_iter().filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '))
}

fn first_word(line: &str) -> String {
    line.split(' ').next().unwrap_or_default().to_owned()
}

/// The lines of a section of a man page, without what troff needs and people do not see.
fn man_section(page: &str, title: &str) -> Vec<String> {
    let titles = [format!(".SH {title}"), format!(".SH \"{title}\"")];
    let lines = page.lines().skip_while(|line| !titles.iter().any(|title| title == line)).skip(1);
    lines.take_while(|line| !line.starts_with(".SH ")).map(plain).collect()
}

fn plain(line: &str) -> String {
    let escapes = [
        ("\\fB", ""),
        ("\\fI", ""),
        ("\\fR", ""),
        ("\\-", "-"),
        ("\\*(Aq", "'"),
        ("\\&", ""),
        ("\\\\", "\\"),
    ];
    escapes.iter().fold(line.to_owned(), |line, (escape, text)| line.replace(escape, text))
}

/// What a section of a man page lists: the terms, and the text of each.
fn man_terms(lines: &[String]) -> Vec<(&str, &str)> {
    let listed = lines.windows(3).filter(|lines| lines[0] == ".TP");
    listed.map(|lines| (lines[1].as_str(), lines[2].as_str())).collect()
}

/// The notes in brackets, such as defaults and other names.
fn notes<'a>(lines: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    let words: Vec<&str> = lines.into_iter().flat_map(str::split_whitespace).collect();
    let text = words.join(" ");
    let starts = ["[alias", "[default"].iter().flat_map(|start| text.match_indices(start));
    starts.map(|(at, _)| text[at..].split_once(']').expect("a closing bracket").0.to_owned()).collect()
}

/// A rendered page without its bold letters, which are printed, taken back, and printed again.
fn without_overstrikes(text: &str) -> String {
    let mut plain = String::new();
    for letter in text.chars() {
        if letter == '\u{8}' {
            plain.pop();
        } else {
            plain.push(letter);
        }
    }
    plain
}

/// Installs everything below a directory; the paths that were printed.
fn install(prefix: &Path) -> Vec<PathBuf> {
    let printed = output(heirloom().arg("setup").arg("--prefix").arg(prefix));
    printed.lines().map(PathBuf::from).collect()
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn every_option_and_argument_of_the_help_is_in_the_page_and_the_other_way_round() {
    for command in program_and_commands() {
        let (help, page) = (help(&command), page(&command));
        let in_help = [section(&help, "Arguments"), section(&help, "Options")].concat();
        let in_page = man_section(&page, "OPTIONS");

        // A header in the help has less indentation than its text has.
        let headers = in_help.iter().filter(|line| !line.starts_with("          "));
        // The page says in its synopsis what can be repeated.
        let headers = headers.map(|line| line.trim().trim_end_matches("..."));
        let headers: BTreeSet<&str> = headers.filter(|line| !line.is_empty()).collect();
        let tagged: Vec<&str> = man_terms(&in_page).into_iter().map(|(header, _)| header).collect();
        let tags = tagged.iter().map(|tag| tag.split(" [default").next().unwrap_or_default());
        assert_eq!(headers, tags.collect(), "heirloom {command}");
        assert!(headers.contains("-h, --help"), "{headers:?}");

        let noted = notes(in_help.iter().copied());
        assert_eq!(noted, notes(in_page.iter().map(String::as_str)), "heirloom {command}");
    }
    assert!(notes(section(&help("chat"), "Options")).contains("[alias: --ipc"));
}

#[test]
fn the_help_and_the_page_have_the_same_sections() {
    for command in program_and_commands() {
        let (help, page) = (help(&command), page(&command));
        for title in SECTIONS {
            let in_page = man_section(&page, &title.to_uppercase());
            let in_page = man_terms(&in_page).into_iter();
            let in_page: Vec<String> = match title {
                "Exit status" => in_page.map(|(code, meaning)| format!("{code}  {meaning}")).collect(),
                _ => in_page.map(|(term, _)| term.to_owned()).collect(),
            };
            let in_help: Vec<&str> = terms(section(&help, title)).collect();
            assert_eq!(in_help, in_page, "{title} of heirloom {command}");
        }
        assert!(!terms(section(&help, "Environment")).eq([""; 0]), "every command logs");
        let short = output(heirloom().args((!command.is_empty()).then_some(&command)).arg("-h"));
        assert!(short.len() < help.len() && !short.contains("Exit status"), "-h is short:\n{short}");
    }
}

#[test]
fn a_command_ends_only_with_codes_of_the_program_and_wrong_usage_is_one() {
    let codes_of = |command: &str| -> Vec<i32> {
        let lines = man_section(&page(command), "EXIT STATUS");
        man_terms(&lines).iter().map(|(code, _)| code.parse().expect("a number")).collect()
    };
    let all = codes_of("");
    let none = Scratch::new();
    for command in commands() {
        let codes = codes_of(&command);
        assert!(codes.iter().all(|code| all.contains(code)), "heirloom {command}: {codes:?}");
        let mut wrong = Process::start(heirloom().args([&command, "--no-such-option"]));
        wrong.wait_for_code(2);
        assert!(codes.is_empty() || codes.contains(&2), "heirloom {command}: {codes:?}");

        // Who says that it notices when nobody is there does.
        if codes.contains(&3) {
            let mut asking = heirloom();
            asking.arg(&command).arg("--control").arg(none.path("none.sock"));
            if command == "proxy" {
                // What it cannot do without.
                asking.args(["--listen", "127.0.0.1:0", "--to", "127.0.0.1:9"]);
            }
            if help(&command).contains("--replace") {
                asking.args(["--replace", "must"]);
            }
            Process::start(&mut asking).wait_for_code(3);
        }
    }
    for command in ["ping", "status", "quit"] {
        assert_eq!(codes_of(command), [0, 1, 2, 3, 4]);
    }
    Process::start(&mut heirloom()).wait_for_code(2);
}

#[test]
fn no_text_mentions_a_command_that_does_not_exist() {
    let known = commands();
    let texts: Vec<String> = program_and_commands()
        .iter()
        .flat_map(|name| [help(name), page(name)])
        .map(|text| plain(&text))
        .collect();
    let mut mentioned = BTreeSet::new();
    for text in &texts {
        let words: Vec<&str> = text.split_whitespace().collect();
        let called = words.windows(2).filter(|words| words[0] == "heirloom").map(|words| words[1]);
        mentioned.extend(called.filter(|word| word.starts_with(|first: char| first.is_ascii_lowercase())));
        // References, such as `heirloom-chat(1),`.
        let pages = words.iter().filter_map(|word| word.strip_prefix("heirloom-")?.split_once("(1)"));
        mentioned.extend(pages.map(|(command, _)| command));
    }
    for word in &mentioned {
        assert!(known.iter().any(|name| name == word), "`heirloom {word}` is mentioned");
    }
    // The search finds what there is: each page is referred to by the program's.
    assert!(known.iter().all(|name| mentioned.contains(name.as_str())), "{mentioned:?}");
    let completions =
        ["bash", "zsh", "fish"].map(|shell| output(heirloom().args(["setup", "--print", shell])));
    for text in texts.iter().chain(&completions) {
        assert!(!text.contains("demo-successor"), "{text}");
    }
}

#[test]
fn setup_writes_these_files_and_prints_their_paths() {
    let scratch = Scratch::new();
    let prefix = scratch.path("new/prefix");
    let printed = install(&prefix);
    let mut expected: Vec<(PathBuf, String)> = program_and_commands()
        .iter()
        .map(|command| (Path::new("share/man/man1").join(page_name(command)), page_name(command)))
        .collect();
    for (path, shell) in [
        ("share/bash-completion/completions/heirloom", "bash"),
        ("share/zsh/site-functions/_heirloom", "zsh"),
        ("share/fish/vendor_completions.d/heirloom.fish", "fish"),
    ] {
        expected.push((path.into(), shell.to_owned()));
    }
    let paths: BTreeSet<PathBuf> = expected.iter().map(|(path, _)| prefix.join(path)).collect();
    assert_eq!(BTreeSet::from_iter(printed), paths);
    assert_eq!(BTreeSet::from_iter(files_below(&prefix)), paths);

    // A second time replaces what is there, even what may not be written to.
    for path in &paths {
        fs::write(path, "something else").expect("write");
        fs::set_permissions(path, fs::Permissions::from_mode(0o400)).expect("chmod");
    }
    install(&prefix);
    assert_eq!(BTreeSet::from_iter(files_below(&prefix)), paths);
    for (path, name) in expected {
        let text = fs::read_to_string(prefix.join(path)).expect("a file");
        assert_eq!(text, output(heirloom().args(["setup", "--print", &name])), "{name}");
    }
}

#[test]
fn a_prefix_that_cannot_be_written_to_is_an_error_and_so_is_an_unknown_name() {
    let scratch = Scratch::new();
    let file = scratch.path("file");
    fs::write(&file, "no directory").expect("write");
    let mut setup = Process::start(heirloom().arg("setup").arg("--prefix").arg(&file));
    setup.wait_for_code(1);
    let first = file.join("share/man/man1/heirloom.1");
    assert!(setup.stderr().contains(&format!("cannot write {}", first.display())), "{}", setup.stderr());
    assert!(
        setup.stderr().contains("--prefix") && setup.stderr().contains("Not a directory"),
        "{}",
        setup.stderr()
    );
    assert!(setup.stdout().is_empty());

    let mut print = Process::start(heirloom().args(["setup", "--print", "heirloom-demo-successor.1"]));
    print.wait_for_code(2);
    assert!(
        print.stderr().contains("heirloom-chat.1") && print.stderr().contains("fish"),
        "{}",
        print.stderr()
    );
    Process::start(heirloom().args(["setup", "--print", "bash", "--prefix", "/"])).wait_for_code(2);
}

#[test]
fn pages_render_without_warnings() {
    if !have("groff") || !have("man") {
        return skip("man and groff are not there: install man-db");
    }
    let scratch = Scratch::new();
    let pages = install(&scratch.path("prefix"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "1"));
    for page in pages {
        let mut groff = Process::start(Command::new("groff").args(["-man", "-ww", "-z"]).arg(&page));
        groff.wait_for_code(0);
        assert_eq!(groff.stderr(), "", "{}", page.display());

        let mut man = Command::new("man");
        man.args(["--warnings", "-E", "UTF-8", "-Tutf8", "-P", "cat", "-l"]).arg(&page);
        let mut man = Process::start(man.env("LC_ALL", "C.UTF-8"));
        man.wait_for_code(0);
        assert_eq!(man.stderr(), "", "{}", page.display());
        let text = without_overstrikes(&String::from_utf8(man.stdout()).expect("UTF-8"));
        for title in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "ENVIRONMENT", "SEE ALSO"] {
            assert!(text.contains(title), "{title} is not in {}:\n{text}", page.display());
        }
    }
}

#[test]
fn man_finds_an_installed_page() {
    if !have("man") {
        return skip("man is not there: install man-db");
    }
    let scratch = Scratch::new();
    install(&scratch.path("prefix"));
    let mut man = Command::new("man");
    man.args(["-P", "cat", "heirloom-chat"]).env("MANPATH", scratch.path("prefix/share/man"));
    let text = output(man.env("LC_ALL", "C.UTF-8"));
    assert!(without_overstrikes(&text).contains("heirloom-chat(1)"), "{text}");
}

#[test]
fn bash_completes_commands_and_options() {
    if !have("bash") {
        return skip("bash is not there");
    }
    let scratch = Scratch::new();
    install(&scratch.path("prefix"));
    let file = scratch.path("prefix/share/bash-completion/completions/heirloom");
    let complete = |words: &[&str]| -> BTreeSet<String> {
        let script = r#"source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            _heirloom heirloom "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}""#;
        let mut bash = Command::new("bash");
        bash.args(["--norc", "-c", script, "bash"]).arg(&file).args(words);
        output(&mut bash).lines().map(str::to_owned).collect()
    };
    assert_eq!(complete(&["heirloom", "ch"]), BTreeSet::from(["chat".to_owned()]));
    assert_eq!(
        complete(&["heirloom", "chat", "--replace", ""]),
        ["never", "try", "must"].map(String::from).into()
    );
    for command in commands() {
        assert!(complete(&["heirloom", ""]).contains(&command));
        let help = help(&command);
        let options = section(&help, "Options").into_iter().filter(|line| line.trim_start().starts_with('-'));
        let options = options.filter_map(|line| line.split("--").nth(1));
        let offered = complete(&["heirloom", &command, "--"]);
        for option in options.filter(|option| option.starts_with(char::is_alphabetic)) {
            let option = format!("--{}", option.split([' ', ']']).next().unwrap_or_default());
            assert!(offered.contains(&option), "{option} of heirloom {command} is not in {offered:?}");
        }
    }
}

#[test]
fn zsh_understands_its_completion() {
    if !have("zsh") {
        return skip("zsh is not there");
    }
    let scratch = Scratch::new();
    install(&scratch.path("prefix"));
    let file = scratch.path("prefix/share/zsh/site-functions/_heirloom");
    assert!(fs::read_to_string(&file).expect("a file").starts_with("#compdef heirloom\n"));
    let mut zsh = Process::start(Command::new("zsh").args(["-f", "-n"]).arg(file));
    zsh.wait_for_code(0);
    assert_eq!(zsh.stderr(), "");
}

#[test]
fn fish_completes_commands() {
    if !have("fish") {
        return skip("fish is not there");
    }
    let scratch = Scratch::new();
    install(&scratch.path("prefix"));
    let file = scratch.path("prefix/share/fish/vendor_completions.d/heirloom.fish");
    let mut fish = Process::start(Command::new("fish").args(["--no-config", "-n"]).arg(&file));
    fish.wait_for_code(0);
    assert_eq!(fish.stderr(), "");
    let mut fish = Command::new("fish");
    fish.args(["--no-config", "-c", "source $argv[1]; complete -C 'heirloom ch'"]).arg(&file);
    let offered = output(fish.env("HOME", scratch.path("home")));
    assert!(offered.lines().any(|line| line.starts_with("chat\t")), "{offered}");
}
