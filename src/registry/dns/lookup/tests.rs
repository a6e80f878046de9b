//! Tests against a small name server: a real one cannot be made to fail in every way.

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::Record;
use hickory_resolver::proto::rr::rdata::{CNAME, NS, SOA};
use tokio::net::UdpSocket;

use super::*;
use crate::fleet::Role;

/// The life of the records of this server, in seconds.
const TTL: u32 = 20;

/// The server's answer to a question.
enum Says {
    RecordSet(Vec<(&'static str, RData)>),
    /// No records, with this negative TTL in seconds.
    Nothing(ResponseCode, Option<u32>),
    /// A referral to another server.
    Referral,
    LookupError(ResponseCode),
}

use Says::{LookupError as Fails, Nothing, RecordSet as Has, Referral};

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn a(last: u8) -> RData {
    RData::A(std::net::Ipv4Addr::new(10, 0, 0, last).into())
}

fn aaaa() -> RData {
    RData::AAAA("fd00::5".parse::<std::net::Ipv6Addr>().unwrap().into())
}

fn service(priority: u16, weight: u16, port: u16, target: &str) -> RData {
    RData::SRV(SRV::new(priority, weight, port, name(target)))
}

/// A server that answers each question with `says`, which gets the queried name with its final dot.
async fn server(says: fn(&str, RecordType) -> Says) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let question = query.queries[0].clone();
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            let here = question.name().clone();
            match says(&here.to_ascii(), question.query_type()) {
                Has(records) => {
                    let record = |(name, data): (&str, RData)| {
                        let name = if name.is_empty() { here.clone() } else { self::name(name) };
                        Record::from_rdata(name, TTL, data)
                    };
                    answer.add_answers(records.into_iter().map(record));
                }
                Nothing(code, ttl) => {
                    answer.metadata.response_code = code;
                    if let Some(ttl) = ttl {
                        let soa = SOA::new(name("ns.test."), name("admin.test."), 1, 1, 1, 1, ttl);
                        answer.add_authority(Record::from_rdata(name("test."), ttl, RData::SOA(soa)));
                    }
                }
                Referral => {
                    answer.add_authority(Record::from_rdata(name("test."), 1, RData::NS(NS(name("ns.test.")))));
                }
                Fails(code) => answer.metadata.response_code = code,
            }
            answer.add_query(question);
            socket.send_to(&answer.to_vec().unwrap(), peer).await.unwrap();
        }
    });
    address
}

/// The answer to a configured name, as text.
async fn ask(question: &str, search: &[&str], says: fn(&str, RecordType) -> Says) -> Result<String, String> {
    let mut lookup = Lookup::new(&[server(says).await]).unwrap();
    lookup.search = Search { domains: search.iter().map(|domain| (*domain).to_owned()).collect(), dots: 5 };
    let answer = lookup.answer(&DnsQuestion::new(Role::Web, question)).await.map_err(|failure| failure.to_string())?;
    let nodes = answer.nodes.iter().map(|node| format!("{}={}x{} ", node.id, node.address, node.weight));
    Ok(nodes.chain([format!("for {}s", answer.ttl.as_secs())]).collect())
}

fn ok(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

#[tokio::test]
async fn addresses_of_ipv6_count_where_there_are_none_of_ipv4() {
    let both = ask("web.test:80", &[], |_, kind| match kind {
        RecordType::A => Has(vec![("", a(2)), ("", a(1))]),
        _ => Has(vec![("", aaaa())]),
    });
    assert_eq!(both.await, ok("10.0.0.1:80=10.0.0.1:80x1 10.0.0.2:80=10.0.0.2:80x1 for 20s"));
    let one = ask("web.test:80", &[], |_, kind| match kind {
        RecordType::A => Nothing(ResponseCode::NoError, Some(7)),
        _ => Has(vec![("", aaaa())]),
    });
    // The absence of A records has a TTL as well.
    assert_eq!(one.await, ok("fd00::5:80=[fd00::5]:80x1 for 7s"));
    // It is unknown whether there are A records, so AAAA records alone are not an answer.
    let unknown = ask("web.test:80", &[], |_, kind| match kind {
        RecordType::A => Fails(ResponseCode::ServFail),
        _ => Has(vec![("", aaaa())]),
    });
    assert!(unknown.await.unwrap_err().contains("Server Failure"));
}

#[tokio::test]
async fn an_alias_is_followed() {
    let answer = ask("web.test:80", &[], |name, _| match name {
        "web.test." => Has(vec![("", RData::CNAME(CNAME(self::name("pool.test.")))), ("pool.test.", a(1))]),
        _ => Nothing(ResponseCode::NXDomain, None),
    });
    assert_eq!(answer.await, ok("10.0.0.1:80=10.0.0.1:80x1 for 20s"));
}

#[tokio::test]
async fn there_are_no_records_only_where_every_name_was_denied() {
    let domains = ["a.test", "b.test"];
    let found = ask("web:80", &domains, |name, _| match name {
        "web.a.test." => Fails(ResponseCode::ServFail),
        "web.b.test." => Has(vec![("", a(1))]),
        _ => Nothing(ResponseCode::NXDomain, Some(9)),
    });
    assert_eq!(found.await, ok("10.0.0.1:80=10.0.0.1:80x1 for 20s"));
    let denied = ask("web:80", &domains, |_, _| Nothing(ResponseCode::NXDomain, Some(9)));
    assert_eq!(denied.await, ok("for 9s"));
    let denied_for_now = ask("web:80", &domains, |_, _| Nothing(ResponseCode::NXDomain, None));
    assert_eq!(denied_for_now.await, ok("for 0s"));
    let failed = ask("web:80", &domains, |name, _| match name {
        "web.a.test." => Fails(ResponseCode::ServFail),
        _ => Nothing(ResponseCode::NXDomain, Some(9)),
    });
    assert!(failed.await.unwrap_err().contains("Server Failure"));
    for says in [|_: &str, _| Referral, |_: &str, _| Fails(ResponseCode::Refused)] {
        assert!(ask("web.:80", &[], says).await.is_err());
    }
}

#[tokio::test]
async fn a_target_without_an_address_is_no_node_and_silence_no_answer() {
    let some = ask("_http._tcp.test.", &[], |name, kind| match (name, kind) {
        (_, RecordType::SRV) => Has(vec![("", service(1, 2, 80, "A.test.")), ("", service(1, 3, 81, "b.test."))]),
        ("A.test.", RecordType::A) => Has(vec![("", a(2)), ("", a(1))]),
        _ => Nothing(ResponseCode::NXDomain, Some(3)),
    });
    assert_eq!(some.await, ok("a.test:80=10.0.0.1:80x2 for 3s"));
    let unknown = ask("_http._tcp.test.", &[], |name, kind| match (name, kind) {
        (_, RecordType::SRV) => Has(vec![("", service(1, 2, 80, "a.test.")), ("", service(1, 3, 81, "b.test."))]),
        ("a.test.", RecordType::A) => Has(vec![("", a(1))]),
        _ => Fails(ResponseCode::ServFail),
    });
    assert!(unknown.await.is_err());
    let none = ask("_http._tcp.test.", &[], |_, _| Has(vec![("", service(0, 0, 0, "."))]));
    assert_eq!(none.await, ok("for 20s"));
}

#[tokio::test]
async fn an_address_is_asked_of_nobody() {
    let lookup = Lookup::new(&["127.0.0.1:1".parse().unwrap()]).unwrap();
    let answer = lookup.answer(&DnsQuestion::new(Role::Web, "[fd00::5]:80")).await.unwrap();
    assert_eq!(answer.nodes, [found("fd00::5".parse().unwrap(), 80)]);
}

fn shown(records: &[RData]) -> Vec<String> {
    targets(records).iter().map(|((target, port), weight)| format!("{target}{port} {weight}")).collect()
}

#[test]
fn services_of_the_first_priority_count_with_their_weights() {
    let first = [service(1, 10, 80, "a.shop."), service(1, 30, 81, "a.shop."), service(2, 1, 80, "b.shop.")];
    assert_eq!(shown(&first), ["a.shop.80 10", "a.shop.81 30"]);
    assert_eq!(shown(&[service(0, 0, 80, "a.shop."), service(0, 0, 80, "b.shop.")]), ["a.shop.80 1", "b.shop.80 1"]);
    // The weights of CoreDNS for three endpoints: an equal share for each.
    let alike = ["a.shop.", "b.shop.", "c.shop."].map(|target| service(0, 33, 80, target));
    assert_eq!(shown(&alike), ["a.shop.80 1", "b.shop.80 1", "c.shop.80 1"]);
    assert_eq!(shown(&[service(0, 0, 80, "a.shop."), service(0, 5, 80, "b.shop.")]), ["a.shop.80 0", "b.shop.80 5"]);
    assert_eq!(shown(&[service(0, 0, 0, ".")]), Vec::<String>::new());
    assert_eq!(shown(&[]), Vec::<String>::new());
}

#[test]
fn addresses_are_in_order_and_each_is_there_once() {
    let records = RecordSet { data: vec![a(9), a(1), a(9), service(0, 0, 1, "a.")], ttl: FOR_EVER };
    assert_eq!(ips(&records), [IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 9])]);
    assert_eq!(found("fd00::5".parse().unwrap(), 80).id, "fd00::5:80");
}
