//! Where a server's answer leads that sends the reader on: `Location` in RFC 9110, an address or a part of one as in RFC 3986.
//! The crate `ureq` would follow by itself, but takes `file:///x` for a file of the same server.

use ureq::http::Uri;

/// Characters of a server's text in a message.
const SHOWN: usize = 200;

/// The address that `location` names, seen from `base`.
///
/// # Errors
/// Why it is not followed.
pub fn redirected(base: &Uri, location: &str) -> Result<Uri, String> {
    let shown: String = location.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    let from = format!("{}://{}", base.scheme_str().unwrap_or_default(), authority(base));
    let absolute = match scheme(location) {
        Some(scheme) if ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) => {
            location.to_owned()
        }
        Some(scheme) => {
            return Err(format!(
                "{from} redirects to an address of the scheme `{}` ({shown}), and only http and https are followed",
                scheme.chars().take(SHOWN).collect::<String>()
            ));
        }
        None if location.is_empty() => return Err(format!("{from} redirects without an address")),
        None if location.starts_with("//") => {
            format!("{}:{location}", base.scheme_str().unwrap_or("https"))
        }
        None if location.starts_with('/') => format!("{from}{location}"),
        None => {
            let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
            format!("{from}{directory}/{location}")
        }
    };
    let address =
        absolute.parse::<Uri>().ok().filter(|uri| uri.scheme().is_some() && !authority(uri).is_empty());
    address.ok_or_else(|| format!("{from} redirects to {shown}, which is no address"))
}

fn authority(uri: &Uri) -> &str {
    uri.authority().map_or("", |authority| authority.as_str())
}

/// What stands before the first colon, where that is a scheme.
fn scheme(text: &str) -> Option<&str> {
    let (scheme, _) = text.split_once(':')?;
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    is_scheme.then_some(scheme)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(location: &str) -> Result<String, String> {
        let base = "https://hub.example:8443/api/models/o/n?blobs=true".parse().unwrap();
        redirected(&base, location).map(|uri| uri.to_string())
    }

    #[test]
    fn addresses_are_absolute_or_seen_from_the_last_one() {
        for (location, expected) in [
            ("http://other.example/x?y=1", "http://other.example/x?y=1"),
            ("HTTPS://other.example", "https://other.example/"),
            ("//other.example/x", "https://other.example/x"),
            ("/x/y:z?w", "https://hub.example:8443/x/y:z?w"),
            ("m?w=1", "https://hub.example:8443/api/models/o/m?w=1"),
            ("./m:1", "https://hub.example:8443/api/models/o/./m:1"),
        ] {
            assert_eq!(of(location).as_deref(), Ok(expected), "{location}");
        }
    }

    #[test]
    fn other_schemes_are_named_and_not_followed() {
        for (location, scheme) in [
            ("file:///etc/passwd", "`file`"),
            ("FILE:///etc/passwd", "`FILE`"),
            ("file:/etc/passwd", "`file`"),
            ("ftp://other.example/x", "`ftp`"),
            ("javascript:alert(1)", "`javascript`"),
            ("data:,x", "`data`"),
        ] {
            let problem = of(location).unwrap_err();
            for part in [scheme, location, "https://hub.example:8443", "only http and https"] {
                assert!(problem.contains(part), "{problem} does not say {part}");
            }
        }
        assert!(of("").unwrap_err().contains("without an address"));
        for location in ["http://", "http:///x", "http://a b/", "https:x", "//"] {
            assert!(of(location).unwrap_err().contains("is no address"), "{location}");
        }
        let long = of(&format!("file:{}\u{1b}", "x".repeat(5000))).unwrap_err();
        assert!(long.len() < 500 && !long.contains('\u{1b}'), "{long}");
    }
}
