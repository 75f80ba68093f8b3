//! One request to a hub: its redirects, its patience, and who may see the token.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use thiserror::Error;
use ureq::config::ConfigBuilder;
use ureq::http::{HeaderMap, StatusCode, Uri};
use ureq::typestate::AgentScope;
use ureq::{Agent, BodyReader};

/// What a server knows its user by. It is shown nowhere, not even by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token, whose surrounding space does not count.
    ///
    /// # Errors
    /// If it holds what no token holds.
    pub fn new(text: &str) -> Result<Token> {
        let text = text.trim();
        let plain = !text.is_empty() && text.chars().all(|one| one.is_ascii_graphic());
        ensure!(plain, "is not a word of plain characters");
        Ok(Token(text.into()))
    }

    /// The header that shows it to a server.
    pub(crate) fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// A text of the server's, in which the token may stand, without it.
    pub(crate) fn hidden_in(&self, text: &str) -> String {
        text.replace(&self.0, "…")
    }
}

/// A web address without a user's name and a query, as requests are sent below.
pub(crate) fn web_address(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    let web = matches!(uri.scheme_str(), Some("http" | "https")) && uri.query().is_none() && !text.contains('#');
    (web && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))).then_some(uri)
}

/// How all requests of ours are made: no redirect is followed unseen, so that it is decided here who sees a token; no
/// reply is packed, so that its size is what arrives.
pub(crate) fn agent() -> ConfigBuilder<AgentScope> {
    let config = Agent::config_builder().max_redirects(0).max_redirects_will_error(false).http_status_as_error(false);
    config.user_agent(concat!("candor/", env!("CARGO_PKG_VERSION"))).accept_encoding("identity")
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("Token(…)")
    }
}

/// Why there is no reply.
#[derive(Debug, Error)]
pub(super) enum Failure {
    /// It may pass: a copy in the cache serves meanwhile.
    #[error("{0}")]
    Unreachable(String),
    /// The hub's answer; `code` is its own word for it, if it has one.
    #[error("the hub answered {}", format!("{status} {code}").trim_end())]
    Refused { status: u16, code: String },
    /// A reply that no hub gives.
    #[error("{0}")]
    Strange(String),
}

/// What came back.
pub(super) struct Reply {
    /// The hash that the hub gives of the file, without quotes.
    pub etag: Option<String>,
    /// The size that the hub says.
    pub size: Option<u64>,
    /// The content.
    pub body: BodyReader<'static>,
}

/// Asks one hub.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: Uri,
    token: Option<&'a Token>,
    patience: Duration,
}

const MOST_REDIRECTS: usize = 5;

impl<'a> Client<'a> {
    pub fn new(endpoint: &str, token: Option<&'a Token>, patience: Duration) -> Result<Client<'a>> {
        let bad = "HF_ENDPOINT is not an address such as https://huggingface.co, without a user's name and a query";
        let uri = web_address(endpoint).context(bad)?;
        let some = Some(patience);
        let config = agent().timeout_resolve(some).timeout_connect(some).timeout_recv_response(some);
        let agent = config.timeout_per_read(some).timeout_per_write(some).build().new_agent();
        Ok(Client { agent, endpoint: uri, token, patience })
    }

    /// Gets what is at a path below the endpoint, wherever that leads.
    pub fn get(&self, path: &str) -> Result<Reply, Failure> {
        let strange = |what: &str| Failure::Strange(what.into());
        let address = format!("{}/{path}", self.endpoint.to_string().trim_end_matches('/'));
        let mut uri: Uri = address.parse().map_err(|_| strange("the address cannot be written"))?;
        let (mut etag, mut size) = (None, None);
        for _ in 0..=MOST_REDIRECTS {
            let at_the_hub = origin(&uri) == origin(&self.endpoint);
            let mut request = self.agent.get(&uri);
            if let Some(token) = self.token.filter(|_| at_the_hub) {
                request = request.header("authorization", token.authorization());
            }
            let response = request.call().map_err(|error| self.unreachable(&uri, &error))?;
            let (status, headers) = (response.status(), response.headers());
            if at_the_hub {
                etag =
                    header(headers, "x-linked-etag").or(header(headers, "etag")).map(|etag| unquoted(&etag)).or(etag);
                let length = header(headers, "content-length").filter(|_| status == StatusCode::OK);
                size = header(headers, "x-linked-size").or(length).and_then(|size| size.parse().ok()).or(size);
            }
            if status == StatusCode::OK {
                return Ok(Reply { etag, size, body: response.into_body().into_reader() });
            }
            if !status.is_redirection() {
                return Err(refusal(&uri, at_the_hub, status, headers));
            }
            let target = header(headers, "location").and_then(|location| follow(&uri, &location));
            uri = target.ok_or_else(|| strange("the hub sends on to an address that is not followed"))?;
        }
        Err(strange("the hub sends from address to address without end"))
    }

    fn unreachable(&self, uri: &Uri, error: &ureq::Error) -> Failure {
        let what = match error {
            ureq::Error::Timeout(_) => format!("nothing arrived for {} seconds", self.patience.as_secs_f64()),
            // It holds the address, and addresses of files are signed.
            ureq::Error::BadUri(_) => "the address cannot be used".into(),
            ureq::Error::Io(error) => error.to_string(),
            other => other.to_string(),
        };
        let host = uri.authority().map_or("", |authority| authority.as_str());
        Failure::Unreachable(format!("{host} was not reached ({what}): check the network, proxies and HF_ENDPOINT"))
    }
}

/// The answer of a hub, or of the host that it sent us on to.
fn refusal(uri: &Uri, at_the_hub: bool, status: StatusCode, headers: &HeaderMap) -> Failure {
    let host = uri.authority().map_or("", |authority| authority.as_str());
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Failure::Unreachable(format!("{host} answered {}: try again later", status.as_u16()));
    }
    if !at_the_hub {
        return Failure::Strange(format!("{host}, which the hub sends on to, answered {}", status.as_u16()));
    }
    let code = header(headers, "x-error-code").unwrap_or_default();
    let code = code.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
    Failure::Refused { status: status.as_u16(), code }
}

pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(String::from)
}

fn unquoted(etag: &str) -> String {
    etag.trim_start_matches("W/").trim_matches('"').to_string()
}

/// Scheme, host and port: what has to be the same for the token to be sent.
fn origin(uri: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let port = uri.port_u16().or(match uri.scheme_str() {
        Some("https") => Some(443),
        _ => Some(80),
    });
    (uri.scheme_str(), uri.host().map(str::to_lowercase), port)
}

/// Where a redirect leads: an address, or a path on the same host. Never from https to http.
fn follow(from: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with('/') && !location.starts_with("//") {
        return format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok();
    }
    let target: Uri = location.parse().ok()?;
    let web = target.scheme_str() == Some("https")
        || target.scheme_str() == Some("http") && from.scheme_str() == Some("http");
    (web && target.host().is_some()).then_some(target)
}
