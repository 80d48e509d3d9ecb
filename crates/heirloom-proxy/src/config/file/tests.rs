use std::num::NonZeroUsize;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::{AccessFormat, Balance};

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, "a.toml")
}

/// A file with everything in it that there is.
const WHOLE: &str = r#"
threads = 2
pin_threads = true
max_connections = 8_000
drain = "10m"
[access_log]
path = "/var/log/heirloom/web.log"
format = "json"

[[listener]]
name = "web"
listen = "0.0.0.0:443"
to = ["10.0.0.1:443", "unix:/run/app.sock", { address = "10.0.0.3:443", name = "third" }]
balance = "least-connections"
connect_timeout = "2s"
retries = 1
idle_timeout = "1h 30m"
max_connections = 1000
keepalive = false
nodelay = false
backlog = 16

[[listener]]
listen = "unix:/run/front.sock"
pool = "app"
mode = "0660"

[pool.app]
balance = "round-robin"
connect_timeout = "500ms"
retries = 10
keepalive = "2m"
nodelay = false
backends = ["127.0.0.1:9001", { address = "127.0.0.1:9002", name = "b2", max_connections = 100 }]
"#;

#[test]
fn everything_that_can_be_said_is_read() {
    let connect = |text: &str| Address::to_connect(text).unwrap();
    let backend = |text: &str| Backend { name: text.into(), address: connect(text), max_connections: None };
    let config = parse(WHOLE).unwrap();
    let expected = Config {
        threads: NonZeroUsize::new(2),
        pin_threads: true,
        max_connections: Some(8000),
        drain: Some(Duration::from_secs(600)),
        access_log: Some(AccessLog {
            path: Some("/var/log/heirloom/web.log".into()),
            format: AccessFormat::Json,
        }),
        listeners: vec![
            Listener {
                name: "web".into(),
                address: Address::to_listen("0.0.0.0:443").unwrap(),
                pool: 1,
                max_connections: Some(1000),
                idle_timeout: Some(Duration::from_secs(5400)),
                keepalive: None,
                nodelay: false,
                backlog: 16,
                mode: None,
            },
            Listener {
                name: "unix:/run/front.sock".into(),
                address: Address::to_listen("unix:/run/front.sock").unwrap(),
                pool: 0,
                max_connections: None,
                idle_timeout: None,
                keepalive: Some(Duration::from_secs(60)),
                nodelay: true,
                backlog: 4096,
                mode: Some(0o660),
            },
        ],
        pools: vec![
            Pool {
                name: "app".into(),
                balance: Balance::RoundRobin,
                connect_timeout: Duration::from_millis(500),
                retries: 1,
                keepalive: Some(Duration::from_secs(120)),
                nodelay: false,
                backends: vec![
                    backend("127.0.0.1:9001"),
                    Backend { name: "b2".into(), max_connections: Some(100), ..backend("127.0.0.1:9002") },
                ],
            },
            Pool {
                name: "web".into(),
                balance: Balance::LeastConnections,
                connect_timeout: Duration::from_secs(2),
                retries: 1,
                keepalive: None,
                nodelay: false,
                backends: vec![
                    backend("10.0.0.1:443"),
                    backend("unix:/run/app.sock"),
                    Backend { name: "third".into(), ..backend("10.0.0.3:443") },
                ],
            },
        ],
    };
    assert_eq!(config, expected);
    assert!(config.warnings().is_empty());
}

#[test]
fn little_needs_to_be_said() {
    let config = parse("[[listener]]\nlisten = ':80'\nto = ['127.0.0.1:81', '127.0.0.1:82']").unwrap();
    assert_eq!((config.threads, config.max_connections, config.drain), (None, None, None));
    assert!(!config.pin_threads);
    assert_eq!(config.access_log, None);
    let pool = &config.pools[0];
    assert_eq!((pool.name.as_str(), pool.balance), (":80", Balance::RoundRobin));
    assert_eq!((pool.connect_timeout, pool.retries), (Duration::from_secs(5), 1));
    assert_eq!((pool.keepalive, pool.nodelay), (Some(Duration::from_secs(60)), true));

    for stdout in ["", "path = '-'"] {
        let text = format!("[access_log]\n{stdout}\n[[listener]]\nlisten = ':80'\nto = ['127.0.0.1:81']");
        let log = parse(&text).unwrap().access_log;
        assert_eq!(log, Some(AccessLog { path: None, format: AccessFormat::Text }), "{stdout}");
    }
}

#[test]
fn pools_are_in_the_order_of_the_file() {
    let text = "[pool.z]\nbackends = ['127.0.0.1:1']\n[pool.a]\nbackends = ['127.0.0.1:2']\n\
                [[listener]]\nlisten = ':80'\npool = 'a'";
    let config = parse(text).unwrap();
    let names: Vec<&str> = config.pools.iter().map(|pool| pool.name.as_str()).collect();
    assert_eq!((names, config.listeners[0].pool), (vec!["z", "a"], 1));
    assert_eq!(config.warnings(), ["no listener uses the pool \"z\""]);
}

#[test]
fn a_listener_that_is_its_own_backend_is_warned_of() {
    let config =
        parse("[[listener]]\nname = 'me'\nlisten = '127.0.0.1:80'\nto = ['localhost:81', '127.0.0.1:80']");
    let warnings = config.unwrap().warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("\"me\" is a backend of its own"), "{warnings:?}");
}

/// A listener as it may be, in six lines; what is tested follows it, from line 7 on.
const LISTENER: &str = "[pool.app]\nbackends = ['127.0.0.1:1']\n[[listener]]\nname = 'one'\nlisten = '127.0.0.1:80'\npool = 'app'\n";

#[test]
fn what_is_wrong_is_said_with_line_and_column() {
    let own = |key: &str| format!("[[listener]]\nlisten = 'unix:/a'\nto = ['127.0.0.1:1']\n{key}\n");
    let pool = |key: &str| format!("[pool.other]\nbackends = ['127.0.0.1:1']\n{key}\n");
    let backend = |list: &str| format!("[pool.other]\nbackends = [{list}]\n");
    // What follows the listener above, the line and the column in that, and what is said.
    let table: &[(&str, usize, usize, &str)] = &[
        // No TOML.
        ("x", 1, 2, "key with no value"),
        ("x = ", 1, 5, "string values must be quoted"),
        ("backlog = 1\nbacklog = 2\n", 2, 1, "duplicate key"),
        ("[pool.app]\n", 1, 7, "duplicate key"),
        // Keys.
        ("liste = 1\n", 1, 1, "unknown key `liste`: is it `listen`?"),
        ("  connect-timeout = '1s'\n", 1, 3, "is it `connect_timeout`?"),
        ("\"\\t\" = 1\n", 1, 1, "unknown key `\\t`: here are `name`, `listen`,"),
        ("[[listeners]]\n", 1, 3, "unknown key `listeners`: is it `listener`?"),
        ("[access_log]\nfile = 'x'\n", 2, 1, "unknown key `file`: here are `path` and `format`"),
        (&pool("max_connections = 1"), 3, 1, "unknown key `max_connections`"),
        (&backend("{ address = '127.0.0.1:1', weight = 1 }"), 2, 40, "unknown key `weight`"),
        ("[pool]\nbackends = []\n", 2, 12, "`pool` is to be a table with a name, [pool.NAME], not a list"),
        // Kinds.
        ("[pool.b]\nbackends = 'x'\n", 2, 12, "`backends` is to be a list in brackets, not a string"),
        ("[access_log]\npath = 1\n", 2, 8, "`path` is to be a string in quotes, not an integer"),
        ("nodelay = 'yes'\n", 1, 11, "`nodelay` is to be true or false, not a string"),
        (&backend("1"), 2, 13, "list of addresses, or of tables with an `address`, not of an integer"),
        (&backend("['127.0.0.1:1']"), 2, 13, "not of a list"),
        // Numbers.
        ("max_connections = 0\n", 1, 19, "`max_connections` is to be from 1 to 4294967295, not 0"),
        ("max_connections = -1\n", 1, 19, "not -1"),
        ("max_connections = 1.5\n", 1, 19, "is to be a number, not a float"),
        ("max_connections = 99999999999999999999\n", 1, 19, "not 99999999999999999999"),
        ("backlog = 0\n", 1, 11, "`backlog` is to be from 1"),
        ("backlog = 0x1_0000_0000\n", 1, 11, "not 0x100000000"),
        (&own("retries = -1"), 4, 11, "`retries` is to be from 0"),
        (
            &backend("{ address = '127.0.0.1:1', max_connections = 0 }"),
            2,
            58,
            "`max_connections` is to be from 1",
        ),
        // Times.
        ("idle_timeout = 30\n", 1, 16, "\"1h 30m\"; 30 has no unit"),
        ("idle_timeout = '30'\n", 1, 16, "not \"30\": time unit needed"),
        ("idle_timeout = 'soon'\n", 1, 16, "not \"soon\""),
        ("idle_timeout = true\n", 1, 16, "not a boolean"),
        ("idle_timeout = '0s'\n", 1, 16, "`idle_timeout` is zero"),
        ("idle_timeout = '400days'\n", 1, 16, "`idle_timeout` is more than a year"),
        (&pool("connect_timeout = '0s'"), 3, 19, "`connect_timeout` is zero"),
        ("keepalive = true\n", 1, 13, "is to be a duration such as \"60s\", or false"),
        ("keepalive = '0s'\n", 1, 13, "from 1s to 32767s, or false"),
        ("keepalive = '1500ms'\n", 1, 13, "whole seconds"),
        ("keepalive = '10h'\n", 1, 13, "from 1s to 32767s"),
        // Words.
        (
            &pool("balance = 'least-connection'"),
            3,
            11,
            "is \"least-connection\": is it \"least-connections\"?",
        ),
        (&pool("balance = 'random'"), 3, 11, "there are `round-robin` and `least-connections`"),
        ("[access_log]\nformat = 'xml'\n", 2, 10, "`format` is \"xml\": there are `text` and `json`"),
        ("[access_log]\npath = ''\n", 2, 8, "`path` is empty"),
        // Names.
        ("[[listener]]\nname = ''\n", 2, 8, "`name` is empty"),
        ("[[listener]]\nname = \"a\\nb\"\n", 2, 8, "`name` has a control character"),
        (
            "[[listener]]\nname = 'one'\nlisten = ':81'\npool = 'app'\n",
            2,
            8,
            "another listener is called \"one\"",
        ),
        (
            "[[listener]]\nname = '127.0.0.1:82'\nlisten = ':81'\npool = 'app'\n[[listener]]\nlisten = '127.0.0.1:82'\n",
            6,
            10,
            "another listener is called \"127.0.0.1:82\"",
        ),
        (
            &backend("{ address = '127.0.0.1:1', name = 'x' }, { name = 'x', address = '127.0.0.1:2' }"),
            2,
            63,
            "another backend of this pool is called \"x\"",
        ),
        (
            "[[listener]]\nname = 'app'\nlisten = ':81'\nto = ['127.0.0.1:1']\n",
            4,
            6,
            "these backends are the pool \"app\"",
        ),
        ("[pool.\"\"]\nbackends = ['127.0.0.1:1']\n", 1, 7, "the pool's name is empty"),
        // Addresses.
        ("[[listener]]\nlisten = '80'\n", 2, 10, "`listen` is no address: \"80\" has no port"),
        ("[[listener]]\nlisten = 80\n", 2, 10, "`listen` is to be a string"),
        ("[[listener]]\npool = 'app'\n", 1, 1, "this listener has no address: write listen ="),
        (
            "[[listener]]\nlisten = '127.0.0.1:80'\npool = 'app'\n",
            2,
            10,
            "\"one\" listens at 127.0.0.1:80 already",
        ),
        (&backend("'127.0.0.1:1', '127.0.0.1:1'"), 2, 28, "is at 127.0.0.1:1 already"),
        (&backend("{ address = '[::1]:0' }"), 2, 25, "`address` is no address: \"[::1]:0\" has port 0"),
        (&backend("'127.0.0.1:1', ':1'"), 2, 28, "this backend is no address: \":1\" has no host"),
        (&backend("{ name = 'x' }"), 2, 13, "this backend has no address"),
        (&own("mode = '0660'").replace("unix:/a", ":81"), 4, 8, "`mode` is for UNIX sockets"),
        (&own("mode = 660"), 4, 8, "permissions in octal as a string, \"0660\" for instance, not an integer"),
        (&own("mode = '0999'"), 4, 8, "not \"0999\""),
        (&own("mode = '4777'"), 4, 8, "not \"4777\""),
        (&own("mode = ''"), 4, 8, "not \"\""),
        // What is to fit together.
        (&own("pool = 'app'"), 4, 8, "write either `to` or `pool`"),
        ("[[listener]]\nlisten = ':81'\n", 1, 1, "\":81\" has no backends"),
        ("[[listener]]\nlisten = ':81'\npool = 'ap'\n", 3, 8, "there is no pool \"ap\": is it \"app\"?"),
        (
            "[[listener]]\nlisten = ':81'\npool = 'other'\n",
            3,
            8,
            "there is no pool \"other\": there are `app`",
        ),
        (&own("[[listener]]\nlisten = ':81'\npool = 'unix:/a'"), 6, 8, "there is no pool \"unix:/a\""),
        ("retries = 1\n", 1, 11, "`retries` is the pool's: write it in [pool.app]"),
        ("[[listener]]\nlisten = ':81'\nto = []\n", 3, 6, "`to` is empty: write at least one"),
        ("[pool.b]\nbackends = []\n", 2, 12, "`backends` is empty"),
        ("[pool.b]\nretries = 1\n", 1, 7, "the pool \"b\" has no backends"),
    ];
    assert!(parse(LISTENER).is_ok());
    for (text, line, column, says) in table {
        let whole = format!("{LISTENER}{text}");
        match parse(&whole) {
            Err(ConfigError::Wrong { line: l, column: c, message, .. }) => {
                assert!(message.contains(says), "{text}\n{message}");
                assert_eq!((l, c), (line + 6, *column), "{text}\n{message}");
            }
            other => panic!("{text}\n{other:?}"),
        }
    }
}

#[test]
fn what_is_wrong_with_the_whole_is_said_too() {
    for (text, position, says) in [
        ("", "a.toml:1:1: ", "there is no listener"),
        ("threads = 0", "a.toml:1:11: ", "`threads` is to be from 1 to 1024, not 0"),
        ("# a comment\nthreads = 1\n", "a.toml:3:1: ", "there is no listener"),
        (
            "listener = 1",
            "a.toml:1:12: ",
            "`listener` is to be a table with two brackets, [[listener]], not an integer",
        ),
        ("[listener]\n", "a.toml:1:1: ", "[[listener]], not a table"),
        ("listener = [1]", "a.toml:1:13: ", "[[listener]], not an integer"),
        (
            "access_log = '/var/log/x'",
            "a.toml:1:14: ",
            "`access_log` is to be a table, [access_log], not a string",
        ),
        ("[[listener]]\nlisten = ':80'\npool = 'app'", "a.toml:3:8: ", "write [pool.app] with `backends`"),
        // Characters are counted, not bytes.
        ("'ä' = 'ö'; x", "a.toml:1:10: ", ""),
        ("'ä' = 1", "a.toml:1:1: ", "unknown key `ä`"),
        ("# ä\r\nö = 1\r\n", "a.toml:2:1: ", ""),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.starts_with(position) && error.contains(says), "{text}\n{error}");
    }
}

#[test]
fn every_key_is_documented() {
    let page = include_str!("../../../../../docs/proxy.md");
    for (text, keys) in [
        ("zzzzzz = 1", 7),
        ("[access_log]\nzzzzzz = 1", 2),
        ("[[listener]]\nzzzzzz = 1", 13),
        ("[pool.a]\nzzzzzz = 1", 6),
        ("[pool.a]\nbackends = [{ zzzzzz = 1 }]", 3),
    ] {
        let error = parse(text).unwrap_err().to_string();
        let (_, known) = error.split_once(": here are ").unwrap();
        let known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
        assert_eq!(known.len(), keys, "{error}");
        for key in known {
            // A table's name is in brackets.
            let shown = [format!("`{key}`"), format!("[{key}"), format!("{key} = ")];
            assert!(shown.iter().any(|shown| page.contains(shown)), "{key}");
        }
    }
}

#[test]
fn a_file_that_is_no_text_is_said_to_be_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.toml");
    fs::write(&path, WHOLE).unwrap();
    assert_eq!(Config::read(&path).unwrap(), parse(WHOLE).unwrap());

    fs::write(&path, b"threads = 1\n# \xc3\xa4 \xff\n").unwrap();
    let error = Config::read(&path).unwrap_err().to_string();
    assert_eq!(error, format!("{}:2:5: this is no UTF-8", path.display()));

    let error = Config::read(directory.path()).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the configuration ") && error.contains("directory"), "{error}");
}

/// Something between a configuration and anything: pieces of one, in any order.
fn pieces() -> impl Strategy<Value = String> {
    let words = WHOLE.split_inclusive([' ', '\n', '=', '"']).map(str::to_owned).collect::<Vec<_>>();
    let piece = prop_oneof![8 => proptest::sample::select(words), 1 => any::<String>(), 1 => "[\\[\\]{}=\"',#\n ]{0,4}"];
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// The whole file with some characters cut out and others put in.
fn damaged() -> impl Strategy<Value = String> {
    (0..WHOLE.len(), 0..12usize, "[\\PC\n]{0,6}").prop_map(|(at, cut, put)| {
        let end = (at + cut).min(WHOLE.len());
        format!("{}{put}{}", &WHOLE[..at], &WHOLE[end..])
    })
}

/// A name that somebody has to be asked for is no matter of this test.
fn without_names(text: &str) -> bool {
    let hosts = text.split(['"', '\'']).filter_map(|word| word.rsplit_once(':')).map(|(host, _)| host);
    hosts.into_iter().all(|host| !host.contains(char::is_alphabetic) || host.starts_with("unix"))
}

proptest! {
    #[test]
    fn any_text_is_a_configuration_or_has_an_error_in_it(
        text in prop_oneof![any::<String>(), pieces(), damaged()].prop_filter("hosts", |text| without_names(text))
    ) {
        match parse(&text) {
            Ok(config) => {
                prop_assert!(!config.listeners.is_empty());
                prop_assert!(config.listeners.iter().all(|listener| listener.pool < config.pools.len()));
                prop_assert!(config.pools.iter().all(|pool| !pool.backends.is_empty()));
                config.warnings();
            }
            Err(ConfigError::Wrong { line, column, message, .. }) => {
                let found = text.split('\n').nth(line.wrapping_sub(1));
                let Some(found) = found else {
                    return Err(TestCaseError::fail(format!("there is no line {line}: {message}")));
                };
                prop_assert!((1..=found.chars().count() + 1).contains(&column), "{line}:{column}: {message}");
                prop_assert!(!message.is_empty());
            }
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }
}
