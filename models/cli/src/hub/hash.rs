//! The hashes by which the hub names its files.

use std::fmt;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// The hash that the hub states for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hash {
    /// Of the bytes: for large files, which lie outside of git.
    Sha256(String),
    /// Of `blob LENGTH\0` and the bytes: git's name for the file.
    GitSha1(String),
}

impl Hash {
    /// As lower-case hexadecimal digits.
    pub fn digits(&self) -> &str {
        match self {
            Self::Sha256(digits) | Self::GitSha1(digits) => digits,
        }
    }

    /// Begins to hash a file that is `bytes` long. (Git puts the length in front.)
    pub fn begin(&self, bytes: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher(Context::new(&SHA256)),
            Self::GitSha1(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {bytes}\0").as_bytes());
                Hasher(context)
            }
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(digits) => write!(f, "SHA-256 {digits}"),
            Self::GitSha1(digits) => write!(f, "git SHA-1 {digits}"),
        }
    }
}

/// A hash under way.
pub struct Hasher(Context);

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// As lower-case hexadecimal digits.
    pub fn finish(self) -> String {
        self.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hashes_are_those_of_git_and_sha256sum() {
        let of = |hash: Hash, bytes: &[u8]| {
            let mut hasher = hash.begin(bytes.len() as u64);
            bytes.chunks(2).for_each(|part| hasher.update(part));
            hasher.finish()
        };
        // `printf hello | git hash-object --stdin` and `printf hello | sha256sum`.
        assert_eq!(of(Hash::GitSha1(String::new()), b"hello"), "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0");
        assert_eq!(
            of(Hash::Sha256(String::new()), b"hello"),
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        );
    }
}
