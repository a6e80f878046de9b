//! `clearcoat man`: writes the manual pages.
//!
//! Commands are told from the definition of the command line, the configuration from [`crate::config::sections`]; so no page
//! has to be kept beside the program, and none can be of another version. A package writes them while it is built
//! (`deploy/build-deb.sh`).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::Cli;
use crate::config::{Section, Setting, sections};

/// Write the manual pages: clearcoat(1), one for each command, and clearcoat.toml(5).
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  clearcoat man /usr/local/share/man && man clearcoat.toml")]
pub(super) struct ManPages {
    /// Where to: they go into the folders man1 and man5 of this one
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl ManPages {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let of_section = |section: &str| {
            let folder = self.folder.join(section);
            fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
            anyhow::Ok(folder)
        };
        let mut command = Cli::command();
        command.build();
        write_commands(&command, &of_section("man1")?)?;
        let mut page = Vec::new();
        configuration().to_writer(&mut page)?;
        write(&of_section("man5")?.join("clearcoat.toml.5"), &page)
    }
}

fn write(path: &Path, page: &[u8]) -> anyhow::Result<()> {
    fs::write(path, page).with_context(|| format!("{} cannot be written", path.display()))
}

const SOURCE: &str = concat!("clearcoat ", env!("CARGO_PKG_VERSION"));

/// The version says how old a page is. Not empty, because an empty argument would vanish, and the next one take its place.
const NO_DATE: &str = " ";

/// The pages of a command and of those below it, but for those that nobody is meant to run.
fn write_commands(command: &clap::Command, folder: &Path) -> anyhow::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        write_commands(below, folder)?;
    }
    let man = Man::new(command.clone()).date(NO_DATE).source(SOURCE).manual("clearcoat");
    let mut page = Vec::new();
    man.render(&mut page)?;
    write(&folder.join(man.get_filename()), &page)
}

/// clearcoat.toml(5).
fn configuration() -> Roff {
    let mut page = Roff::new();
    page.control("TH", ["clearcoat.toml", "5", NO_DATE, SOURCE, "clearcoat"]);
    // Some allowed values are too long for lines that end alike.
    page.control("ad", ["l"]);
    page.control("SH", ["NAME"]);
    page.text([roman("clearcoat.toml - the configuration of clearcoat")]);
    page.control("SH", ["DESCRIPTION"]);
    let paragraphs = [
        "clearcoat serve reads the file that --config or the variable CLEARCOAT_CONFIG names, else clearcoat.toml in its working \
         folder; the service reads /etc/clearcoat/clearcoat.toml. It is TOML. Every key has a default, but for those of a list of \
         tables. clearcoat check says what is wrong with a file, with line and column; --show prints every key with its value.",
        "Each key is an environment variable as well: edge.listen is CLEARCOAT_EDGE__LISTEN, health.web.interval is \
         CLEARCOAT_HEALTH__WEB__INTERVAL, with commas between the items of a list.",
        "After a change, send SIGHUP (systemctl reload clearcoat), or wait for some seconds: the file is looked at. A file with an \
         error changes nothing.",
    ];
    for (index, paragraph) in paragraphs.into_iter().enumerate() {
        if index > 0 {
            page.control("PP", []);
        }
        page.text([roman(paragraph)]);
    }
    for section in sections() {
        describe(&section, &mut page);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([bold("clearcoat"), roman("(1), "), bold("clearcoat-check"), roman("(1)")]);
    page
}

fn describe(section: &Section, page: &mut Roff) {
    page.control("SH", [section.heading().as_str()]);
    if !section.about.is_empty() {
        page.text([roman(section.about.as_str())]);
    }
    for Setting { key, default, allowed, meaning, when } in &section.settings {
        page.control("TP", []);
        page.text([bold(key.as_str())]);
        if !meaning.is_empty() {
            page.text([roman(format!("{meaning}."))]);
        }
        page.text([italic("Allowed: "), roman(format!("{allowed}."))]);
        page.text([italic("Default: "), roman(format!("{default}."))]);
        if !when.is_empty() {
            page.text([roman(when.as_str())]);
        }
    }
}
