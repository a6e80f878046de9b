//! The parameters of a varnishd beside what clearcoat sends it and expects of it. Pure.

use std::time::Duration;

use super::finding::Finding;
use crate::varnish::cli_text::Parameters;

/// Room for the name of the header beside its value: `X-Magento-Tags-Pattern: `, and what ends the line.
const HEADER_NAME: u64 = 64;

/// The rest of a purge beside its longest header.
const REQUEST_REST: u64 = 1024;

/// The default of `http_resp_hdr_len`: an `X-Magento-Tags` of a category page is longer.
const SHORT_HEADER: u64 = 8 * 1024;

/// The seal and what else a page has beside its tags (`X-Clearcoat-Seal` takes up to 8 KiB).
const ANSWER_REST: u64 = 16 * 1024;

/// How much longer than our idle connections those of Varnish should live: they are swept a little late.
const IDLE_MARGIN: Duration = Duration::from_secs(1);

/// A lurker that waits longer than this before it looks at a ban leaves its work to the readers.
const LONG_LURKER_AGE: Duration = Duration::from_secs(300);

/// What the parameters must go with.
#[derive(Clone, Copy, Debug)]
pub(super) struct ParameterContext {
    /// The longest header of a purge, in bytes.
    pub(super) header_limit: usize,
    /// `limits.max_answer_head`.
    pub(super) max_answer_head: usize,
    /// `limits.max_fields`.
    pub(super) max_fields: usize,
    /// `timeouts.node_keep_alive`.
    pub(super) idle_limit: Duration,
}

/// What does not go together.
pub(super) fn judge(parameters: &Parameters, context: &ParameterContext) -> Vec<Finding> {
    let judges =
        [header_limit, request_size, answer_header, answer_size, backend_workspace, idle_timeout, lurker_sleep];
    let mut findings: Vec<Finding> = judges.into_iter().filter_map(|judge| judge(parameters, context)).collect();
    findings.extend(
        [lurker_age, answer_head, answer_fields, retries].into_iter().filter_map(|judge| judge(parameters, context)),
    );
    findings
}

/// The command that sets a parameter now, and where it has to stand for the next start.
fn set(name: &str, value: &str) -> String {
    format!("`varnishadm param.set {name} {value}`, and -p {name}={value} where varnishd is started")
}

fn kib(bytes: u64) -> String {
    format!("{}k", bytes.div_ceil(1024))
}

fn header_limit(parameters: &Parameters, context: &ParameterContext) -> Option<Finding> {
    let taken = parameters.bytes("http_req_hdr_len")?;
    let wanted = context.header_limit as u64 + HEADER_NAME;
    (taken < wanted).then(|| {
        let what =
            format!("http_req_hdr_len is {taken} bytes, and purges have headers of {wanted} bytes (header_limit)");
        let why = "It answers 400 to a purge of many tags, and is out of traffic until somebody mends that.";
        let lower = taken.saturating_sub(HEADER_NAME);
        let change = format!("{}; or header_limit = {lower} in its [[node]]", set("http_req_hdr_len", &kib(wanted)));
        Finding::error("header-limit", what).why(why).change(change)
    })
}

fn request_size(parameters: &Parameters, context: &ParameterContext) -> Option<Finding> {
    let taken = parameters.bytes("http_req_size")?;
    let wanted = context.header_limit as u64 + HEADER_NAME + REQUEST_REST;
    (taken < wanted).then(|| {
        let what = format!("http_req_size is {taken} bytes, and a purge takes up to {wanted}");
        let why = "It closes the connection on a purge of many tags.";
        Finding::error("request-size", what).why(why).change(set("http_req_size", &kib(2 * wanted)))
    })
}

fn answer_header(parameters: &Parameters, _: &ParameterContext) -> Option<Finding> {
    let taken = parameters.bytes("http_resp_hdr_len")?;
    (taken <= SHORT_HEADER).then(|| {
        let what = format!(
            "http_resp_hdr_len is {taken} bytes, and X-Magento-Tags of a category page may be longer (how long the longest is, is not \
             measured)"
        );
        let why = "Varnish answers 503 to every reader of a page with a longer header.";
        Finding::warning("response-header", what).why(why).change(set("http_resp_hdr_len", "64k"))
    })
}

fn answer_size(parameters: &Parameters, _: &ParameterContext) -> Option<Finding> {
    let (head, header) = (parameters.bytes("http_resp_size")?, parameters.bytes("http_resp_hdr_len")?);
    let wanted = header + ANSWER_REST;
    (head < wanted).then(|| {
        let what = format!(
            "http_resp_size is {head} bytes: too little for a header of http_resp_hdr_len ({header}) and the rest"
        );
        let why = "Varnish answers 503 to every reader of a page with a longer head.";
        Finding::warning("response-size", what).why(why).change(set("http_resp_size", &kib(wanted)))
    })
}

fn backend_workspace(parameters: &Parameters, _: &ParameterContext) -> Option<Finding> {
    let (space, head) = (parameters.bytes("workspace_backend")?, parameters.bytes("http_resp_size")?);
    (space < 2 * head).then(|| {
        let what = format!("workspace_backend is {space} bytes: less than two heads of http_resp_size ({head})");
        let why = "A page with a long head fails with 503, though its head is allowed.";
        Finding::warning("workspace-backend", what)
            .why(why)
            .change(set("workspace_backend", &kib(2 * head + 64 * 1024)))
    })
}

fn idle_timeout(parameters: &Parameters, context: &ParameterContext) -> Option<Finding> {
    let (theirs, ours) = (parameters.seconds("timeout_idle")?, context.idle_limit);
    (theirs < ours + IDLE_MARGIN).then(|| {
        let what = format!(
            "timeout_idle is {theirs:?}, and clearcoat keeps idle connections for {ours:?} (timeouts.node_keep_alive)"
        );
        let why =
            "Varnish closes connections on which clearcoat is just sending: requests are sent twice, and a POST fails.";
        Finding::warning("idle-timeout", what).why(why).change(set("timeout_idle", "65"))
    })
}

fn lurker_sleep(parameters: &Parameters, _: &ParameterContext) -> Option<Finding> {
    parameters.seconds("ban_lurker_sleep")?.is_zero().then(|| {
        let why = "Nobody works bans off: the list grows, and each hit is tested against all of it.";
        let finding = Finding::warning("ban-lurker-off", "ban_lurker_sleep is 0: the ban lurker is off");
        finding.why(why).change(set("ban_lurker_sleep", "0.010"))
    })
}

fn lurker_age(parameters: &Parameters, _: &ParameterContext) -> Option<Finding> {
    let age = parameters.seconds("ban_lurker_age")?;
    (age > LONG_LURKER_AGE).then(|| {
        let why = "Until then each hit is tested against them.";
        let finding = Finding::warning("ban-lurker-late", format!("the ban lurker leaves bans alone for {age:?}"));
        finding.why(why).change(set("ban_lurker_age", "60"))
    })
}

fn answer_head(parameters: &Parameters, context: &ParameterContext) -> Option<Finding> {
    let (theirs, ours) = (parameters.bytes("http_resp_size")?, context.max_answer_head as u64);
    (theirs > ours).then(|| {
        let what = format!("http_resp_size is {theirs} bytes, and limits.max_answer_head {ours}");
        let why = "A head that Varnish takes is a 502 at the edge.";
        Finding::warning("answer-head-limit", what)
            .why(why)
            .change(format!("max_answer_head = {} in [limits]", theirs + 8192))
    })
}

fn answer_fields(parameters: &Parameters, context: &ParameterContext) -> Option<Finding> {
    let (theirs, ours) = (parameters.count("http_max_hdr")?, context.max_fields as u64);
    (theirs > ours).then(|| {
        let what = format!("http_max_hdr is {theirs}, and limits.max_fields {ours}");
        let why = "An answer with more header fields is a 502 at the edge.";
        Finding::warning("answer-fields-limit", what).why(why).change(format!("max_fields = {theirs} in [limits]"))
    })
}

fn retries(parameters: &Parameters, _: &ParameterContext) -> Option<Finding> {
    (parameters.count("max_retries")? == 0).then(|| {
        let finding = Finding::warning("no-retries", "max_retries is 0");
        let why = "A VCL for several clearcoats asks none but the first: while one restarts, readers get 503.";
        finding.why(why).change(set("max_retries", "4"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::varnish::cli_text::parse_parameters;

    const CONTEXT: ParameterContext = ParameterContext {
        header_limit: 7680,
        max_answer_head: 131_072,
        max_fields: 100,
        idle_limit: Duration::from_secs(4),
    };

    /// As docs/vcl.md has varnishd started.
    const WELL: [&str; 12] = [
        "ban_lurker_age                60.000 [seconds] (default)",
        "ban_lurker_sleep              0.010 [seconds] (default)",
        "http_max_hdr                  64 [header lines] (default)",
        "http_req_hdr_len              8k [bytes] (default)",
        "http_req_size                 32k [bytes] (default)",
        "http_resp_hdr_len             64k [bytes]",
        "http_resp_size                96k [bytes]",
        "max_retries                   4 [retries] (default)",
        "timeout_idle                  65.000 [seconds]",
        "workspace_backend             256k [bytes]",
        "workspace_client              96k [bytes] (default)",
        "workspace_session             0.75k [bytes] (default)",
    ];

    fn named(lines: &[&str]) -> Vec<&'static str> {
        judge(&parse_parameters(&lines.join("\n")), &CONTEXT).iter().map(Finding::name).collect()
    }

    #[test]
    fn a_varnishd_that_is_started_as_the_page_says_is_well() {
        assert!(named(&WELL).is_empty(), "{:?}", named(&WELL));
        assert!(named(&[]).is_empty());
    }

    #[test]
    fn each_parameter_that_does_not_go_with_clearcoat_has_its_name() {
        for (line, expected) in [
            ("ban_lurker_age 3600.000 [seconds]", vec!["ban-lurker-late"]),
            ("ban_lurker_sleep 0.000 [seconds]", vec!["ban-lurker-off"]),
            ("http_max_hdr 128 [header lines]", vec!["answer-fields-limit"]),
            ("http_req_hdr_len 4k [bytes]", vec!["header-limit"]),
            ("http_req_size 8k [bytes]", vec!["request-size"]),
            ("http_resp_hdr_len 8k [bytes] (default)", vec!["response-header"]),
            ("http_resp_size 64k [bytes]", vec!["response-size"]),
            ("http_resp_size 129k [bytes]", vec!["workspace-backend", "answer-head-limit"]),
            ("max_retries 0 [retries]", vec!["no-retries"]),
            ("timeout_idle 4.000 [seconds]", vec!["idle-timeout"]),
            ("workspace_backend 128k [bytes]", vec!["workspace-backend"]),
        ] {
            let name = line.split(' ').next().unwrap();
            let mut lines: Vec<&str> = WELL.into_iter().filter(|well| !well.starts_with(&format!("{name} "))).collect();
            lines.push(line);
            assert_eq!(named(&lines), expected, "{line}");
        }
    }

    #[test]
    fn what_to_set_mends_it() {
        let few = ["http_req_hdr_len 1k [bytes]", "http_req_size 2k [bytes]"].join("\n");
        let findings = judge(&parse_parameters(&few), &CONTEXT);
        let text = serde_json::to_string(&findings).unwrap();
        assert!(text.contains("param.set http_req_hdr_len 8k`") && text.contains("header_limit = 960"), "{text}");
        assert!(text.contains("param.set http_req_size 18k`"), "{text}");
    }
}
