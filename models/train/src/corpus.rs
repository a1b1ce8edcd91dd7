//! The text of a training run as it is read: documents from files, and their split.

mod files;
mod rows;

use std::path::PathBuf;

use bitnet_burn_formats::files as formats_files;
use bitnet_burn_formats::random::SplitMix64;
use sha2::{Digest, Sha256};

use crate::TrainError;
use crate::config::DataOptions;

/// Fewer documents than these are not split as a whole.
const FEW: usize = 20;

/// Bad rows that are kept to be shown.
const SHOWN: usize = 5;

/// Documents of text, in order.
///
/// ```
/// use bitnet_burn_train::{Corpus, DataOptions};
///
/// let dir = tempfile::tempdir()?;
/// std::fs::write(dir.path().join("a.jsonl"), "{\"text\": \"one\"}\n{\"text\": \"two\"}\n")?;
/// let corpus = Corpus::read(&[dir.path().into()], &DataOptions::default())?;
/// assert_eq!(corpus.documents(), ["one", "two"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    documents: Vec<String>,
    /// Where the documents of each source end.
    ends: Vec<usize>,
    bad_rows: Vec<BadRow>,
    bad_row_count: u64,
    validation: Option<Vec<String>>,
}

/// A row of a file that holds no document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRow {
    /// The file.
    pub path: PathBuf,
    /// Which row it is, and what is wrong with it.
    pub problem: String,
}

impl Corpus {
    /// Documents that are there already; empty ones are left out.
    pub fn new(documents: impl IntoIterator<Item = String>) -> Self {
        let documents: Vec<_> = documents.into_iter().filter(|text| !text.trim().is_empty()).collect();
        Self { ends: vec![documents.len()], documents, ..Self::default() }
    }

    /// Reads sources: files, directories with all files of text in them, and patterns such as `data/*.parquet`, each in the
    /// order of the paths. A file is plain text, JSON Lines (`.jsonl`, `.ndjson`) or Parquet (`.parquet`); the first two
    /// may be compressed (`.gz`, `.zst`).
    ///
    /// # Errors
    /// If nothing is found, a file can't be read or has no text, plain text is not UTF-8, a Parquet file lacks the column,
    /// or more rows are bad than [`DataOptions::bad_rows`] allows.
    pub fn read(sources: &[PathBuf], options: &DataOptions) -> Result<Self, TrainError> {
        let mut corpus = Self::default();
        for source in sources {
            for path in files::find(source)? {
                corpus.read_file(path, options)?;
            }
            corpus.ends.push(corpus.documents.len());
        }
        Ok(corpus)
    }

    fn read_file(&mut self, path: PathBuf, options: &DataOptions) -> Result<(), TrainError> {
        let before = (self.documents.len(), self.bad_row_count);
        rows::read(&path, options, &mut |row| {
            let problem = match row {
                Ok(text) => {
                    if !text.trim().is_empty() {
                        self.documents.push(text);
                    }
                    return Ok(());
                }
                Err(problem) => problem,
            };
            self.bad_row_count += 1;
            if self.bad_row_count > options.bad_rows {
                let problem = format!(
                    "{problem} (bad rows so far: {}; `data.bad_rows` allows {})",
                    self.bad_row_count, options.bad_rows
                );
                return Err(TrainError::Text { path: path.clone(), problem });
            }
            if self.bad_rows.len() < SHOWN {
                self.bad_rows.push(BadRow { path: path.clone(), problem });
            }
            Ok(())
        })?;
        if (self.documents.len(), self.bad_row_count) == before {
            return Err(TrainError::Text { path, problem: "there is no text in it".into() });
        }
        Ok(())
    }

    /// The same corpus with documents of its own for validation: then none of its others are kept for that.
    pub fn with_validation(self, validation: Self) -> Self {
        Self {
            validation: Some(validation.documents),
            bad_row_count: self.bad_row_count + validation.bad_row_count,
            bad_rows: self.bad_rows.into_iter().chain(validation.bad_rows).take(SHOWN).collect(),
            ..self
        }
    }

    /// The documents.
    pub fn documents(&self) -> &[String] {
        &self.documents
    }

    /// How many sources it was read from.
    pub fn sources(&self) -> usize {
        self.ends.len()
    }

    /// The first rows that were left out because they are bad.
    pub fn bad_rows(&self) -> &[BadRow] {
        &self.bad_rows
    }

    /// How many rows were left out.
    pub fn bad_row_count(&self) -> u64 {
        self.bad_row_count
    }

    /// SHA-256 of the documents.
    pub(crate) fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |texts: &[String]| {
            for text in texts {
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
        };
        add(&self.documents);
        if let Some(validation) = &self.validation {
            add(&["validation".to_owned()]);
            add(validation);
        }
        for end in &self.ends {
            hash.update((*end as u64).to_le_bytes());
        }
        formats_files::hex(&hash.finalize())
    }

    /// Documents for training, by source, and for validation. `whole`: few documents are not cut, either.
    pub(crate) fn split(&self, share: f64, seed: u64, whole: bool) -> (Vec<Vec<&str>>, Vec<&str>) {
        let documents: Vec<&str> = self.documents.iter().map(String::as_str).collect();
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = || starts.clone().zip(&self.ends).map(|(start, &end)| start..end);
        if let Some(validation) = &self.validation {
            let training = ranges().map(|range| documents[range].to_vec()).collect();
            return (training, validation.iter().map(String::as_str).collect());
        }
        if whole || documents.len() >= FEW {
            let mut order: Vec<usize> = (0..documents.len()).collect();
            shuffle(&mut order, &mut SplitMix64::new(seed ^ 0x5711));
            let count = ((documents.len() as f64 * share).round() as usize).max(1).min(documents.len());
            let mut validation = vec![false; documents.len()];
            order[..count].iter().for_each(|&i| validation[i] = true);
            let training =
                ranges().map(|range| range.filter(|&i| !validation[i]).map(|i| documents[i]).collect());
            let kept = (0..documents.len()).filter(|&i| validation[i]).map(|i| documents[i]);
            return (training.collect(), kept.collect());
        }
        let cut = |text: &'_ str| {
            let mut at = (text.len() as f64 * (1.0 - share)) as usize;
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let halves: Vec<_> = documents.into_iter().map(|text| text.split_at(cut(text))).collect();
        let training = ranges().map(|range| halves[range].iter().map(|half| half.0).collect()).collect();
        (training, halves.iter().map(|half| half.1).collect())
    }
}

/// Fisher and Yates.
pub(crate) fn shuffle<T>(items: &mut [T], random: &mut SplitMix64) {
    for i in (1..items.len()).rev() {
        items.swap(i, random.below(i as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests;
