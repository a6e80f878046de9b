//! What a varnishd answers at its management port, as values.
//!
//! These texts are for people, and were changed now and then: 6.0 writes `auto/warm` where 7.0 and later have two columns, a
//! parameter has `(default)` behind it since 4.1, a list of backends has a header line of other names in each version. So
//! nothing is found by its column: lines are cut into words, a line that cannot be read is left out, and what is not there is
//! `None`. (JSON, `-j`, is there since 6.2 only, and for some commands alone.)
//!
//! All is pure. The texts in the tests are those of Debian's varnishd 7.1.1, and of the sources of 6.0 and of 8 and 9 where
//! these write something else.

use std::time::Duration;

/// A ban of `ban.list`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ListedBan {
    /// When it was added, in seconds since 1970.
    pub added: f64,
    /// It is worked off, or another one of the same text has come later: nothing is tested against it.
    pub is_completed: bool,
}

/// A VCL of `vcl.list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedVcl {
    /// The first word: `active`, `available` or `discarded`.
    pub status: String,
    /// The name of the program: of a label, that which it stands for.
    pub name: String,
    /// The name of the label, if it is one.
    pub label: Option<String>,
    /// Its backends are there: it can be used at once. One that is on the way to that, or away from it, is not.
    pub is_warm: bool,
}

/// A backend of `backend.list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedBackend {
    /// With the name of its VCL: `boot.default`.
    pub name: String,
    /// Its probe fails, or an operator says so.
    pub is_sick: bool,
}

/// A parameter of `param.show`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value as it is written, without its unit.
    pub value: String,
}

/// All parameters of a varnishd.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(Vec<Parameter>);

/// The time of varnishd, in seconds since 1970, from the answer to `ping`: `PONG 1795857899 1.0`.
pub fn parse_ping(text: &str) -> Option<u64> {
    text.trim_start().strip_prefix("PONG ")?.split_whitespace().next()?.parse().ok()
}

/// Whether the worker runs, from the answer to `status`: `Child in state running`.
pub fn parse_status(text: &str) -> Option<bool> {
    Some(text.trim().strip_prefix("Child in state ")? == "running")
}

/// The process ids of manager and worker from the answer to `pid`. The worker's is `None` while there is none.
pub fn parse_pids(text: &str) -> Option<(u32, Option<u32>)> {
    let of = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)?.trim().parse().ok());
    Some((of("Master:")?, of("Worker:")))
}

/// The version from the answer to `banner`: `varnish-7.1.1 revision 7cee1c58`.
pub fn parse_banner(text: &str) -> Option<&str> {
    text.lines().map(str::trim).find(|line| line.contains(" revision "))
}

/// The first two numbers of a version: `(7, 1)` of `varnish-7.1.1 revision 7cee1c58`.
pub fn parse_version(banner: &str) -> Option<(u32, u32)> {
    let program = banner.split_whitespace().next()?;
    let version = program.split('-').find(|part| part.starts_with(|first: char| first.is_ascii_digit()))?;
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The bans of `ban.list`, the newest first.
pub fn parse_bans(text: &str) -> Vec<ListedBan> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let added = words.next()?.parse().ok().filter(|added: &f64| added.is_finite() && *added > 0.0)?;
        // The number of objects that refer to it comes between.
        words.next()?.parse::<u64>().ok()?;
        let is_completed = words.next()?.starts_with('C');
        Some(ListedBan { added, is_completed })
    };
    text.lines().filter_map(parse).collect()
}

/// The VCLs of `vcl.list`.
pub fn parse_vcls(text: &str) -> Vec<ListedVcl> {
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (&status, &state) = (words.first()?, words.get(1)?);
        if !["active", "available", "discarded"].contains(&status) {
            return None;
        }
        // 6.0: STATUS STATE/TEMPERATURE BUSY NAME; later: STATUS STATE TEMPERATURE BUSY NAME. A label is followed by `->` and
        // what it stands for.
        let (at, state, temperature) = match state.split_once('/') {
            Some((state, temperature)) => (3, state, temperature),
            None => (4, state, *words.get(2)?),
        };
        let is_warm = temperature == "warm";
        let name = (*words.get(at)?).to_owned();
        let target = words.get(at + 1).filter(|arrow| **arrow == "->").and_then(|_| words.get(at + 2));
        let status = status.to_owned();
        match target.filter(|_| state == "label") {
            Some(target) => Some(ListedVcl { status, name: (*target).to_owned(), label: Some(name), is_warm }),
            None => Some(ListedVcl { status, name, label: None, is_warm }),
        }
    };
    text.lines().filter_map(parse).collect()
}

/// The backends of `backend.list`. Those without a probe are healthy.
pub fn parse_backends(text: &str) -> Vec<ListedBackend> {
    let parse = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next().filter(|name| name.contains('.'))?.to_owned();
        // 6.0: `boot.default probe Sick 0/8`; later: `boot.default probe 2/8 sick`. Set by hand, the word stands in `Admin`.
        let is_sick = words.take(4).any(|word| word.eq_ignore_ascii_case("sick"));
        Some(ListedBackend { name, is_sick })
    };
    text.lines().filter_map(parse).collect()
}

/// The first line of the answer to `panic.show`, and the reason in the second; varnishd refuses the command if there was none.
pub fn parse_panic(text: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let at = lines.find(|line| line.contains("anic at: "))?;
    let reason = lines.next().unwrap_or_default();
    Some(format!("{at}: {reason}"))
}

/// The parameters of `param.show`. Explanations of single ones (`param.show NAME`) are none.
pub fn parse_parameters(text: &str) -> Parameters {
    let parse = |line: &str| {
        // What is below a parameter is indented.
        let is_name = line.starts_with(|first: char| first.is_ascii_lowercase());
        let (name, value) = line.split_once(char::is_whitespace).filter(|_| is_name)?;
        let value = value.trim().trim_end_matches("(default)").trim_end();
        let value = value.rsplit_once(" [").map_or(value, |(value, _)| value).trim_end();
        Some(Parameter { name: name.to_owned(), value: value.to_owned() })
    };
    Parameters(text.lines().filter_map(parse).collect())
}

impl Parameters {
    /// The value of this parameter as it is written.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|parameter| parameter.name == name).map(|parameter| parameter.value.as_str())
    }

    /// A parameter in bytes, such as `8k` or `0.75k`: with the suffixes b, k, m, g, t, p (tools/vnum.c).
    pub fn bytes(&self, name: &str) -> Option<u64> {
        let value = self.text(name)?;
        let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let power = match value[digits.len()..].to_ascii_lowercase().trim_end_matches('b') {
            "" => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            "p" => 5,
            _ => return None,
        };
        let number: f64 = digits.parse().ok()?;
        let bytes = number * 1024_f64.powi(power);
        // Saturating, as `as` is; what is below 0 is no size.
        (bytes.is_finite() && bytes >= 0.0).then_some(bytes as u64)
    }

    /// A parameter in seconds. `never` and `infinite` are the longest time.
    pub fn seconds(&self, name: &str) -> Option<Duration> {
        match self.text(name)? {
            "never" | "infinite" | "infinity" => Some(Duration::MAX),
            value => Duration::try_from_secs_f64(value.parse().ok()?).ok(),
        }
    }

    /// A parameter that is a number without a unit.
    pub fn count(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_answers_are_read() {
        assert_eq!(parse_ping("PONG 1795857899 1.0\n"), Some(1_795_857_899));
        assert_eq!(parse_ping("PONG"), None);
        assert_eq!(parse_status("Child in state running\n"), Some(true));
        assert_eq!(parse_status("Child in state stopped"), Some(false));
        assert_eq!(parse_status("running"), None);
        assert_eq!(parse_pids("Master:      31119\nWorker:      31133\n"), Some((31119, Some(31133))));
        assert_eq!(parse_pids("Master:       5413\n\n"), Some((5413, None)));
    }

    #[test]
    fn a_banner_names_the_version() {
        let seven = "-----------------------------\nVarnish Cache CLI 1.0\n-----------------------------\n\
                     Linux,6.1.0-18-amd64,x86_64,-junix,-smalloc,-sdefault,-hcritbit\n\
                     varnish-7.1.1 revision 7cee1c581bead20e88d101ab3d72afb29f14d87a\n\nType 'help' for command list.\n";
        assert_eq!(parse_banner(seven), Some("varnish-7.1.1 revision 7cee1c581bead20e88d101ab3d72afb29f14d87a"));
        let plus = "Varnish Cache CLI 1.0\nLinux,5.4.0,x86_64\nvarnish-plus-6.0.13r4 revision 1234\n";
        assert_eq!(parse_banner(plus), Some("varnish-plus-6.0.13r4 revision 1234"));
        assert_eq!(parse_banner("-----\nVarnish Cache CLI 1.0\n"), None);
        let versions =
            ["varnish-7.1.1 revision 7c", "varnish-plus-6.0.13r4 revision 1", "varnish-trunk revision 1", ""];
        assert_eq!(versions.map(parse_version), [Some((7, 1)), Some((6, 0)), None, None]);
    }

    #[test]
    fn bans_have_an_age_and_may_be_completed() {
        let text = "Present bans:\n1795858128.185205     0 -  req.url ~ y1\n1795858128.181025    24 -  obj.http.X ~ C\n\
                    1795858127.175831     8 C\n1795858126.100000     0 C  \n\n";
        let bans = parse_bans(text);
        assert_eq!(bans.iter().map(|ban| ban.is_completed).collect::<Vec<_>>(), [false, false, true, true]);
        assert!((bans[0].added - 1_795_858_128.185_205).abs() < 1e-3);
        assert!(parse_bans("Present bans:\n").is_empty());
        // With the lurker's debugging on, there are lines in between.
        assert!(parse_bans("oc = 0x7f\nnan 1 -\n").is_empty());
    }

    #[test]
    fn the_vcl_in_use_is_found_in_the_list_of_every_version() {
        let active = |text: &str| {
            let vcls = parse_vcls(text);
            vcls.into_iter().find(|vcl| vcl.status == "active").unwrap()
        };
        let plain = |name: &str| ListedVcl { status: "active".into(), name: name.into(), label: None, is_warm: true };
        // 6.0 to 6.6, and later ones.
        let six = "available   auto/warm          0 boot (1 label)\navailable  label/warm          0 shop -> boot\n\
                   active      auto/warm          3 second\n\n";
        assert_eq!(active(six), plain("second"));
        let seven = "available   auto     warm         0    boot\nactive      auto     warm         0    two     <-    (1 label)\n\
                     available   label    warm         0    shop    ->    two\n\n";
        assert_eq!(active(seven), plain("two"));
        let labelled =
            "available   auto    warm   0   two <- (1 label)\nactive  label  warm  0  shop  ->  two  (1 return(vcl))\n";
        assert_eq!(active(labelled), ListedVcl { label: Some("shop".into()), ..plain("two") });
        // While the worker is stopped.
        assert_eq!(active("active      auto     warm         -    boot\n"), plain("boot"));
        assert_eq!(active("active      auto/warm          - boot\n"), plain("boot"));
        assert!(parse_vcls("\nfoo\nactive\n").is_empty());
        let cold = |text: &str| parse_vcls(text).iter().map(|vcl| vcl.is_warm).collect::<Vec<_>>();
        assert_eq!(cold("available   auto/cold          0 boot\navailable   cold/cooling       1 a\n"), [false; 2]);
        assert_eq!(cold("available   auto    cold    0    boot\navailable   warm    warm    0    a\n"), [false, true]);
    }

    #[test]
    fn a_sick_backend_is_found_in_the_list_of_every_version() {
        let sick = |text: &str| {
            let backends = parse_backends(text).into_iter();
            backends.map(|backend| (backend.name, backend.is_sick)).collect::<Vec<_>>()
        };
        let seven = "Backend name   Admin    Probe    Health    Last change\n\
                     boot.default   probe    2/8      sick      Sat, 28 Nov 2026 09:24:57 GMT\n\
                     boot.other     healthy  0/0      healthy   Sat, 28 Nov 2026 09:24:57 GMT\n\
                     boot.third     sick     0/0      sick      Sat, 28 Nov 2026 09:24:57 GMT\n\n";
        let named = |name: &str, is_sick| (name.to_owned(), is_sick);
        let expected = [named("boot.default", true), named("boot.other", false), named("boot.third", true)];
        assert_eq!(sick(seven), expected);
        let six = "Backend name                   Admin      Probe                Last updated\n\
                   boot.default                   probe      Sick 0/8             Sat, 28 Nov 2026 09:24:57 GMT\n\
                   boot.other                     probe      Healthy (no probe)   Sat, 28 Nov 2026 09:24:57 GMT\n";
        assert_eq!(sick(six), [named("boot.default", true), named("boot.other", false)]);
    }

    #[test]
    fn a_panic_is_told_in_a_line() {
        let text = "Panic at: Sat, 28 Nov 2026 09:28:48 GMT\nAssert error in ccf_panic(), cache/cache_panic.c line 834:\n  \
                    Condition((strcmp(\\\"\\\", \\\"You asked for it\\\")) == 0) not true.\n";
        let expected =
            "Panic at: Sat, 28 Nov 2026 09:28:48 GMT: Assert error in ccf_panic(), cache/cache_panic.c line 834:";
        assert_eq!(parse_panic(text).unwrap(), expected);
        // 4.1 to 6.0.
        assert!(parse_panic("Last panic at: Sat, 28 Nov 2026 09:28:48 GMT\n\"Assert error in x\n").is_some());
        assert_eq!(parse_panic("Child has not panicked or panic has been cleared"), None);
    }

    #[test]
    fn parameters_have_values_with_units() {
        let text = "accept_filter                 -\nban_lurker_age                60.000 [seconds] (default)\n\
                    ban_lurker_batch              1000 (default)\nban_lurker_sleep              0.010 [seconds] (default)\n\
                    cc_command                    exec gcc -g -O2 [x] -o %o %s (default)\n\
                    http_req_hdr_len              8k [bytes] (default)\nhttp_resp_size                96k [bytes]\n\
                    max_retries                   4 [retries] (default)\nworkspace_session             0.75k [bytes] (default)\n\
                    send_timeout                  never [seconds]\nvsl_space                     80M [bytes] (default)\n\n";
        let parameters = parse_parameters(text);
        assert_eq!(parameters.bytes("http_req_hdr_len"), Some(8192));
        assert_eq!(parameters.bytes("http_resp_size"), Some(98_304));
        assert_eq!(parameters.bytes("workspace_session"), Some(768));
        assert_eq!(parameters.bytes("vsl_space"), Some(80 << 20));
        assert_eq!(parameters.seconds("ban_lurker_sleep"), Some(Duration::from_millis(10)));
        assert_eq!(parameters.seconds("send_timeout"), Some(Duration::MAX));
        assert_eq!(parameters.count("max_retries"), Some(4));
        assert_eq!(parameters.count("ban_lurker_batch"), Some(1000));
        assert_eq!(parameters.text("accept_filter"), Some("-"));
        assert_eq!((parameters.bytes("accept_filter"), parameters.bytes("not_there")), (None, None));
        // `param.show ban_lurker_sleep`.
        let one = "ban_lurker_sleep\n        Value is: 0.010 [seconds] (default)\n        Minimum is: 0.000\n";
        assert_eq!(parse_parameters(one), Parameters::default());
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(text in "[\\PC\n\t]{0,300}") {
            let parameters = parse_parameters(&text);
            for name in ["a", "ab"] {
                let _ = (parameters.bytes(name), parameters.seconds(name), parameters.count(name));
            }
            let _ = (parse_bans(&text), parse_vcls(&text), parse_backends(&text), parse_panic(&text));
            let _ = (parse_ping(&text), parse_status(&text), parse_pids(&text), parse_banner(&text), parse_version(&text));
        }

        #[test]
        fn no_size_is_a_panic(value in "[0-9a-zA-Z.+-]{0,12}") {
            let parameters = parse_parameters(&format!("x {value} [bytes]\n"));
            let _ = (parameters.bytes("x"), parameters.seconds("x"), parameters.count("x"));
        }
    }
}
