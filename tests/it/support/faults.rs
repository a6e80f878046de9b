//! VCL faults, for `Plan::vcl`.

use std::path::{Path, PathBuf};

use super::fleet::Fleet;

/// With this VCL a Varnish serves and passes its health checks, but fails every purge while [`fail_purges`] is on.
pub fn purges_can_fail(vcl: &str, id: &str, folder: &Path) -> String {
    let failing = switch(folder, id);
    let rule = format!(
        "sub vcl_recv {{\n    if (req.method == \"PURGE\" && req.url != \"/.clearcoat/probe\" && std.file_exists(\"{}\")) {{\n        \
         return (synth(503, \"Purges fail\"));\n    }}\n",
        failing.display()
    );
    vcl.replacen("sub vcl_recv {\n", &rule, 1)
}

/// Turns the fault of [`purges_can_fail`] on or off for one Varnish.
pub fn fail_purges(fleet: &Fleet, id: &str, fail: bool) {
    let file = switch(fleet.folder.path(), id);
    if fail { std::fs::write(file, "") } else { std::fs::remove_file(file) }.expect("a file in our folder");
}

fn switch(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}-fails-purges"))
}

/// The second Varnish accepts purges from no address of this fleet.
pub fn second_refuses_clearcoat(vcl: &str, id: &str, _folder: &Path) -> String {
    if id == "varnish-2" { vcl.replacen("\"127.0.0.0\"/8;", "\"192.0.2.1\"/32;", 1) } else { vcl.to_owned() }
}
