//! `docs/quick-start.md`: its files are written and its commands run as they stand there, in their order, by one shell, and what it
//! says that they print is what they print. In a network of its own, since the page has ports that somebody may use here.

use std::path::Path;
use std::process::{Command, Stdio};

const PAGE: &str = include_str!("../../docs/quick-start.md");

/// The blocks of the page, each with its language.
fn blocks() -> impl Iterator<Item = (&'static str, &'static str)> {
    // What stands between fences is every second piece.
    PAGE.split("```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'))
}

/// The script that a reader types, and what the page says that it prints.
fn typed(folder: &Path) -> (String, String) {
    let (mut script, mut printed) = (String::new(), String::new());
    for (language, block) in blocks() {
        match language {
            "console" => {
                for line in block.lines() {
                    match line.strip_prefix("$ ") {
                        Some(command) => script += &format!("{command}\n"),
                        None => printed += &format!("{line}\n"),
                    }
                }
            }
            "toml" | "php" => {
                let (name, content) = block.split_once('\n').expect("a line with the name of the file");
                let file = folder.join(name.strip_prefix("# ").expect("the name of the file"));
                std::fs::create_dir_all(file.parent().expect("a folder")).expect("the folder is made");
                // The name is a comment of TOML, and nothing of PHP.
                std::fs::write(file, if language == "php" { content } else { block }).expect("the file is written");
            }
            _ => assert_eq!(language, "", "a block that nobody tries: {block}"),
        }
    }
    (script, printed)
}

#[test]
fn the_quick_start_does_what_it_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let (script, printed) = typed(folder.path());
    assert!(
        script.matches("clearcoat ").count() > 5 && printed.matches("The price is").count() > 3,
        "{script}{printed}"
    );
    let programs = Path::new(env!("CARGO_BIN_EXE_clearcoat")).parent().expect("a folder").display().to_string();
    // A network of one's own takes a right, which who is not root has in a namespace of users. What the script leaves behind ends
    // with the first process of its namespace. As nobody sits at this terminal, a command that fails ends the script.
    let right: &[&str] =
        if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-current-user", "--keep-caps"] };
    let script = format!("set -e\nip link set lo up\n{script}");
    let output = Command::new("timeout")
        .args(["--kill-after=5", "240", "unshare", "--net", "--pid", "--mount-proc", "--kill-child", "--fork"])
        .args(right)
        .args(["bash", "-c", &script])
        .env("PATH", format!("{programs}:{}:/usr/sbin", std::env::var("PATH").expect("a PATH")))
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .output()
        .expect("timeout is installed");
    let said = String::from_utf8_lossy(&output.stdout);
    let log = std::fs::read_to_string(folder.path().join("clearcoat.log")).unwrap_or_default();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}\n{errors}\n{log}", output.status);
    assert_eq!(said, printed, "{errors}\n{log}");
}
