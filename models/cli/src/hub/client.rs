//! The hub's HTTP interface: what a model consists of, and the bytes of its files.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use hf_hub::Cache;
use serde::Deserialize;
use ureq::Agent;
use ureq::http::{Response, StatusCode, Uri, header};

use super::hash::Hash;
use super::redirect::redirected;
use super::{Entry, variable};

/// How long the hub may be silent.
const PATIENCE: Duration = Duration::from_secs(30);

/// Servers that send on to one another, at most.
const REDIRECTS: usize = 10;

/// Bytes of a model's list of files at most. (It has about 200 for each.)
const LISTING_LIMIT: u64 = 32 << 20;

/// Why the hub did not answer as hoped.
#[derive(Debug)]
pub enum HubError {
    /// No answer, or one that may be another one later.
    Unreachable(String),
    /// Asking again would not help.
    Refused(anyhow::Error),
}

/// A model at its newest commit.
#[derive(Debug)]
pub struct Listing {
    pub commit: String,
    files: Vec<File>,
}

/// A file of a model.
#[derive(Clone, Debug)]
pub struct File {
    /// Its path in the repository, with `/`. Not checked.
    pub name: String,
    pub bytes: u64,
    pub hash: Hash,
}

impl Listing {
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |File { name, bytes, .. }: &File| Entry { name: name.clone(), bytes: *bytes };
        self.files.iter().map(entry).collect()
    }

    pub fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|file| file.name == name)
    }
}

/// The parts that matter of `/api/models/OWNER/NAME/revision/main?blobs=true`.
#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

/// Whether a text consists of `digits` lower-case hexadecimal digits.
pub fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl TryFrom<Sibling> for File {
    type Error = anyhow::Error;

    fn try_from(sibling: Sibling) -> anyhow::Result<Self> {
        let Sibling { rfilename: name, size, blob_id, lfs } = sibling;
        let hash = match (lfs, blob_id) {
            (Some(lfs), _) if is_hex(&lfs.sha256, 64) => Hash::Sha256(lfs.sha256),
            (None, Some(id)) if is_hex(&id, 40) => Hash::GitSha1(id),
            _ => bail!("it states no hash for {name:?}"),
        };
        let bytes = size.with_context(|| format!("it states no size for {name:?}"))?;
        Ok(Self { name, bytes, hash })
    }
}

/// A connection to the hub.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    endpoint: String,
    /// `Bearer TOKEN`.
    authorization: Option<String>,
}

impl Client {
    /// At `HF_ENDPOINT`, with the token in `HF_TOKEN`, or in the file where Hugging Face's programs keep it.
    pub fn from_environment() -> anyhow::Result<Self> {
        let endpoint = match std::env::var("HF_ENDPOINT") {
            Ok(endpoint) if !endpoint.is_empty() => endpoint.trim_end_matches('/').to_owned(),
            _ => "https://huggingface.co".into(),
        };
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            bail!("HF_ENDPOINT: {endpoint:?} does not begin with https:// or http://");
        }
        let authorization = token()?.map(|token| format!("Bearer {token}"));
        Ok(Self { agent: agent(), endpoint, authorization })
    }

    /// Of any server, which gets no token.
    pub fn of_server(endpoint: String) -> Self {
        Self { agent: agent(), endpoint, authorization: None }
    }

    /// Where a file of the hub is, at the newest commit.
    pub fn address(&self, id: &str, file: &str) -> String {
        format!("{}/{id}/resolve/{}/{}", self.endpoint, super::BRANCH, encoded(file))
    }

    /// All bytes at an address, at most `limit`; `None` if there is nothing.
    pub fn download(&self, url: &str, limit: u64) -> Result<Option<Vec<u8>>, HubError> {
        let mut response = self.request(url, None)?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(HubError::Unreachable(format!("{url} answers with status {status}")));
            }
            status => return Err(HubError::Refused(anyhow!("{url}: unexpected answer, status {status}"))),
        }
        let body = response.body_mut().with_config().limit(limit).read_to_vec();
        body.map(Some).map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => HubError::Refused(anyhow!("{url}: more than {limit} bytes")),
            error => self.unreachable(&error),
        })
    }

    /// The files of a model at its newest commit.
    pub fn listing(&self, id: &str) -> Result<Listing, HubError> {
        let url = format!("{}/api/models/{id}/revision/{}?blobs=true", self.endpoint, super::BRANCH);
        let mut response = self.request(&url, None)?;
        if !response.status().is_success() {
            return Err(self.refusal(&response, id, None));
        }
        let body = response.body_mut().with_config().limit(LISTING_LIMIT).read_to_vec();
        let body = body.map_err(|error| self.unreachable(&error))?;
        let listing = || {
            let ModelInfo { sha, siblings } = serde_json::from_slice(&body)?;
            if !is_hex(&sha, 40) {
                bail!("{sha:?} is not a commit");
            }
            let files = siblings.into_iter().map(File::try_from).collect::<Result<_, _>>()?;
            Ok(Listing { commit: sha, files })
        };
        let about = || format!("{}: the list of the files of {id} is not as expected", self.endpoint);
        listing().with_context(about).map_err(HubError::Refused)
    }

    /// The bytes of a file from `start` on, or from its beginning, if the server can't do otherwise; with where they start.
    pub fn read(
        &self,
        id: &str,
        commit: &str,
        file: &File,
        start: u64,
    ) -> Result<(impl Read + use<>, u64), HubError> {
        let url = format!("{}/{id}/resolve/{commit}/{}", self.endpoint, encoded(&file.name));
        let response = self.request(&url, (start > 0).then_some(start))?;
        let start = match response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if starts_at(&response) == Some(start) => start,
            StatusCode::PARTIAL_CONTENT => {
                let error =
                    anyhow!("{}: {} came from another place than asked for", self.endpoint, file.name);
                return Err(HubError::Refused(error));
            }
            _ => return Err(self.refusal(&response, id, Some(&file.name))),
        };
        Ok((response.into_body().into_reader(), start))
    }

    fn request(&self, url: &str, start: Option<u64>) -> Result<Response<ureq::Body>, HubError> {
        let mut url: Uri = url.parse().map_err(|error| {
            HubError::Refused(anyhow!("HF_ENDPOINT: {:?} is no address ({error})", self.endpoint))
        })?;
        let mut authorization = self.authorization.as_ref();
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(authorization) = authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            if let Some(start) = start {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            let response = request.call().map_err(|error| self.unreachable(&error))?;
            let Some(location) = location(&response) else { return Ok(response) };
            let next = redirected(&url, &location).map_err(|problem| {
                HubError::Refused(anyhow!(
                    "{}: {problem}, so nothing was downloaded. Ask whoever runs the proxy, or the server that HF_ENDPOINT \
                     names",
                    self.endpoint
                ))
            })?;
            if (url.scheme_str(), next.scheme_str()) == (Some("https"), Some("http")) {
                return Err(HubError::Refused(anyhow!("{url} redirects to {next}, which is not encrypted")));
            }
            // Never to another server: files come from servers that have signed addresses instead.
            if (next.scheme(), next.authority()) != (url.scheme(), url.authority()) {
                authorization = None;
            }
            url = next;
        }
        Err(HubError::Unreachable(format!("{} redirects more than {REDIRECTS} times", self.endpoint)))
    }

    fn unreachable(&self, error: &ureq::Error) -> HubError {
        HubError::Unreachable(format!("{} can't be reached ({error})", self.endpoint))
    }

    /// An answer without content, in terms of what to do.
    fn refusal(&self, response: &Response<ureq::Body>, id: &str, file: Option<&str>) -> HubError {
        let field = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
        };
        let status = response.status();
        let page = format!("{}/{id}", self.endpoint);
        let token = match self.authorization {
            Some(_) => {
                "the token that was sent (HF_TOKEN, or the file that `hf auth login` wrote) has no access"
            }
            None => {
                "no token was sent: set HF_TOKEN to one of https://huggingface.co/settings/tokens, or run `hf auth login`"
            }
        };
        let text = match (status.as_u16(), field("x-error-code"), file) {
            (408 | 429 | 500.., ..) => {
                return HubError::Unreachable(format!("{} answers with status {status}", self.endpoint));
            }
            (_, "GatedRepo", _) => format!(
                "{page} asks for consent to its terms before it can be downloaded: open the page and agree; {token}"
            ),
            (401 | 404, "RepoNotFound", _) | (404, _, None) => {
                format!(
                    "{page}: there is no such model, or it is private; check OWNER and NAME. For a private one, {token}"
                )
            }
            (401 | 403, ..) => format!("{page}: access was refused (status {status}); {token}"),
            (404, _, Some(file)) => format!("{page}: the file {file} is not there any more; start again"),
            _ => format!(
                "{page}: unexpected answer, status {status} {}",
                field("x-error-message").escape_debug()
            ),
        };
        HubError::Refused(anyhow!(text))
    }
}

/// Follows no redirects: they are followed here.
fn agent() -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("bitnet/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .build();
    config.into()
}

/// Where an answer sends its reader, if it is such an answer: an address, in the server's words.
fn location(response: &Response<ureq::Body>) -> Option<String> {
    matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308).then(|| {
        let location = response.headers().get(header::LOCATION);
        location.map_or(String::new(), |location| String::from_utf8_lossy(location.as_bytes()).into_owned())
    })
}

/// Where the bytes of an answer start: `Content-Range: bytes 100-199/200`.
fn starts_at(response: &Response<ureq::Body>) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// A file's name in an address.
fn encoded(name: &str) -> String {
    let byte = |b: u8| match b {
        b'/' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
        b if b.is_ascii_alphanumeric() => char::from(b).to_string(),
        b => format!("%{b:02X}"),
    };
    name.bytes().map(byte).collect()
}

/// The user's token, if there is one.
fn token() -> anyhow::Result<Option<String>> {
    let (source, token) = match (std::env::var_os("HF_TOKEN"), variable("HF_TOKEN_PATH")) {
        (Some(token), _) if !token.is_empty() => ("HF_TOKEN", token.into_string().ok()),
        (_, Some(path)) => match std::fs::read_to_string(&path) {
            Ok(text) => ("HF_TOKEN_PATH", Some(text)),
            Err(error) => bail!("HF_TOKEN_PATH: cannot read {}: {error}", path.display()),
        },
        _ => match Cache::new(super::home()?.join("hub")).token() {
            Some(token) => ("the file `token` in HF_HOME", Some(token)),
            None => return Ok(None),
        },
    };
    let token = token.map(|token| token.trim().to_owned());
    match token.filter(|token| token.bytes().all(|b| b.is_ascii_graphic())) {
        Some(token) => Ok(Some(token).filter(|token| !token.is_empty())),
        None => bail!("{source}: the token has characters that no token has"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_in_addresses_are_encoded() {
        assert_eq!(super::encoded("a b/ü?#%.gguf"), "a%20b/%C3%BC%3F%23%25.gguf");
    }
}
