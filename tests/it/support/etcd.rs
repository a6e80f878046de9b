//! A real etcd of one or several members, on its own addresses, and ways to break it.

pub mod access;
pub mod backup;
pub mod certificates;
mod data;
pub mod link;
mod loopback;
mod member;
mod space;

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error};
use tokio::runtime::{self, Runtime};

use self::certificates::Certificates;
use self::loopback::Loopback;
use self::member::{Cluster, Member};
use super::{PATIENCE, eventually};

/// How long a gate waits for one member before it retries: a member that has just lost its leader may hold a request
/// for longer than it takes to find another.
const ATTEMPT: Duration = Duration::from_secs(1);

/// A key that never exists.
const NOWHERE: &str = "\0nowhere";

/// A running etcd, killed when this value is dropped.
///
/// After a fault the next data call waits until the running members serve again ([`Etcd::healthy`]). No call is
/// retried: a request that fails with its member fails the test.
pub struct Etcd {
    members: Vec<Member>,
    cluster: Cluster,
    /// A client of each member, kept while its process is the same.
    clients: Vec<Mutex<Option<Client>>>,
    /// The member used for data; none is chosen after a fault.
    speaker: Mutex<Option<usize>>,
    /// Why a gate is not open yet.
    refusal: Mutex<String>,
    /// The password of root, if authentication is on.
    root: Option<String>,
    runtime: Runtime,
    // The processes end before their folder and their address do.
    folder: tempfile::TempDir,
    _loopback: Loopback,
}

impl Etcd {
    /// Starts one with a single member, and waits until it serves.
    pub fn start() -> Self {
        Etcd::cluster(1)
    }

    /// The same with several members.
    pub fn cluster(members: usize) -> Self {
        Etcd::launch(members, "http", None, |_, _| None)
    }

    /// The same, with every write synced to disk, as in production.
    pub fn on_disk(members: usize) -> Self {
        Etcd::launch_in(tempfile::tempdir().expect("a folder"), members, "http", None, |_, _| None)
    }

    /// A single member with TLS, which requires clients with a certificate of its authority: see [`Etcd::tls`].
    pub fn start_tls() -> Self {
        Etcd::launch(1, "https", None, |folder, loopback| Some(Certificates::make(folder, loopback.ip())))
    }

    fn launch(
        members: usize,
        scheme: &str,
        quota: Option<u64>,
        certificates: impl FnOnce(&Path, &Loopback) -> Option<Certificates>,
    ) -> Self {
        Etcd::launch_in(folder(), members, scheme, quota, certificates)
    }

    fn launch_in(
        folder: tempfile::TempDir,
        members: usize,
        scheme: &str,
        quota: Option<u64>,
        certificates: impl FnOnce(&Path, &Loopback) -> Option<Certificates>,
    ) -> Self {
        let loopback = Loopback::claim(&member::ports(members));
        let members: Vec<Member> =
            (0..members).map(|number| Member::new(number, loopback.ip(), scheme, folder.path())).collect();
        let initial: Vec<String> =
            members.iter().map(|member| format!("{}={}", member.name, member.peer_url)).collect();
        let certificates = certificates(folder.path(), &loopback);
        let mut etcd = Etcd {
            clients: members.iter().map(|_| Mutex::default()).collect(),
            cluster: Cluster { members: initial.join(","), token: "clearcoat".to_owned(), certificates, quota },
            members,
            speaker: Mutex::default(),
            refusal: Mutex::default(),
            root: None,
            runtime: runtime::Builder::new_current_thread().enable_all().build().expect("a runtime"),
            folder,
            _loopback: loopback,
        };
        etcd.restart_all();
        etcd.healthy();
        etcd
    }

    /// The client endpoint of every member.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client_url.clone()).collect()
    }

    pub fn endpoint(&self, member: usize) -> &str {
        &self.members[member].client_url
    }

    /// The files of an etcd with TLS.
    pub fn tls(&self) -> &Certificates {
        self.cluster.certificates.as_ref().expect("an etcd of start_tls")
    }

    /// The end of a member's log.
    pub fn log(&self, member: usize) -> String {
        self.members[member].log()
    }

    /// kill -9 of one member. Its address stays reserved.
    pub fn kill(&mut self, member: usize) {
        self.members[member].kill();
        self.unsettle(member);
    }

    /// Stops the process of one member: its connections stay, but it does not answer.
    pub fn hang(&mut self, member: usize) {
        self.members[member].hang();
        self.unsettle(member);
    }

    /// Resumes a hanging member.
    pub fn resume(&mut self, member: usize) {
        self.members[member].resume();
        self.unsettle(member);
    }

    /// Restarts a member with its data on disk, after a kill -9 if it runs. It may not serve yet.
    pub fn restart(&mut self, member: usize) {
        self.kill(member);
        self.members[member].start(&self.cluster);
    }

    pub fn kill_all(&mut self) {
        (0..self.members.len()).for_each(|member| self.kill(member));
    }

    pub fn restart_all(&mut self) {
        self.kill_all();
        (0..self.members.len()).for_each(|member| self.restart(member));
    }

    /// Waits until all running (not hanging) members follow one of them, and returns it.
    pub fn leader(&self) -> usize {
        eventually("all members of etcd that run follow one of them", || self.agreed_leader())
    }

    /// Waits until every running (not hanging) member answers a linearizable read.
    pub fn healthy(&self) {
        self.settle();
    }

    fn settle(&self) -> usize {
        let leader = eventually("all members of etcd that run serve", || {
            let leader = self.agreed_leader()?;
            // A leader drops reads until it has committed an entry of its own term, and etcd waits for seconds for such
            // a read. Deleting a missing key is committed like any write, but makes no revision.
            self.attempt(leader, async |mut client| client.delete(NOWHERE, None).await)?;
            let mut running = self.running().into_iter();
            let reads = |member| self.attempt(member, async |mut client| client.get(NOWHERE, None).await).is_some();
            running.all(reads).then_some(leader)
        });
        *self.speaker.lock().unwrap() = Some(leader);
        leader
    }

    fn running(&self) -> Vec<usize> {
        (0..self.members.len()).filter(|member| self.members[*member].runs()).collect()
    }

    fn agreed_leader(&self) -> Option<usize> {
        let running = self.running();
        assert!(!running.is_empty(), "no member of etcd runs");
        let ask = |member: &usize| self.attempt(*member, async |mut client| client.status().await);
        let said = running.iter().map(ask).collect::<Option<Vec<_>>>()?;
        let leader = said[0].leader();
        let place = said.iter().position(|status| status.header().expect("a header").member_id() == leader)?;
        said.iter().all(|status| status.leader() == leader).then(|| running[place])
    }

    /// Forgets what was learnt through this member.
    fn unsettle(&mut self, member: usize) {
        self.clients[member] = Mutex::default();
        self.speaker = Mutex::default();
    }

    fn unsettle_all(&mut self) {
        (0..self.members.len()).for_each(|member| self.unsettle(member));
    }

    /// Sends a request that must succeed, or the test fails. `what` completes the sentence of the failure.
    fn call<T>(&self, what: &str, ask: impl AsyncFnOnce(Client) -> Result<T, Error>) -> T {
        let speaker = *self.speaker.lock().unwrap();
        let member = speaker.unwrap_or_else(|| self.settle());
        let answer = self.ask(PATIENCE, member, ask);
        answer.unwrap_or_else(|error| panic!("{} failed to {what}: {error}", self.members[member].name))
    }

    /// Sends a request to a member that may not be able to answer yet.
    fn attempt<T>(&self, member: usize, ask: impl AsyncFnOnce(Client) -> Result<T, Error>) -> Option<T> {
        let answer = self.ask(ATTEMPT, member, ask);
        answer
            .inspect_err(|error| *self.refusal.lock().unwrap() = format!("{}: {error}", self.members[member].name))
            .ok()
    }

    fn ask<T>(
        &self,
        patience: Duration,
        member: usize,
        ask: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let answer = async { ask(self.client(member).await?).await };
        let answer = self.runtime.block_on(async { tokio::time::timeout(patience, answer).await });
        let answer = answer.unwrap_or_else(|_| Err(Error::Internal(format!("no answer within {patience:?}"))));
        // A failed connection is not used again.
        answer.inspect_err(|_| *self.clients[member].lock().unwrap() = None)
    }

    async fn client(&self, member: usize) -> Result<Client, Error> {
        if let Some(client) = self.clients[member].lock().unwrap().clone() {
            return Ok(client);
        }
        let mut options = ConnectOptions::new().with_connect_timeout(ATTEMPT).with_auto_token_refresh(true);
        if let Some(password) = &self.root {
            options = options.with_user("root", password);
        }
        if let Some(certificates) = &self.cluster.certificates {
            options = options.with_tls(certificates.for_client());
        }
        let client = Client::connect([self.endpoint(member)], Some(options)).await?;
        *self.clients[member].lock().unwrap() = Some(client.clone());
        Ok(client)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let refusal = self.refusal.get_mut().unwrap_or_else(PoisonError::into_inner);
            eprintln!("what etcd refused at last: {refusal}");
            self.members.iter().for_each(|member| eprintln!("{}", member.log()));
        }
    }
}

/// In memory if there is enough: etcd syncs every write to disk, and preallocates 128 MB at once.
fn folder() -> tempfile::TempDir {
    const MEMORY: &str = "/dev/shm";
    let builder = tempfile::Builder::new().prefix("etcd-").to_owned();
    let free = rustix::fs::statvfs(MEMORY).map_or(0, |place| place.f_bavail * place.f_frsize);
    if free >= 4 << 30 { builder.tempdir_in(MEMORY) } else { builder.tempdir() }.expect("a folder")
}
