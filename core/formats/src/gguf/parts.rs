//! Files in parts, as `llama-gguf-split` writes them: each is a GGUF file, the first of which has all keys.
//!
//! | key | |
//! | --- | --- |
//! | `split.no` | the part's number, from 0 |
//! | `split.count` | how many parts there are |
//! | `split.tensors.count` | tensors of all parts |
//!
//! Their names end in `-00001-of-00003.gguf`, where the numbers begin at 1.

use super::{GgufFile, Value};
use crate::error::FileError;
use std::path::{Path, PathBuf};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// (number from 1, count) of a part, by its file's name: `-00001-of-00003.gguf`.
pub fn part_of(path: &Path) -> Option<(u32, u32)> {
    let number = |text: &str| -> Option<u32> {
        let digits = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok())?
    };
    let (before, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    Some((number(before.rsplit_once('-')?.1)?, number(count)?))
}

/// The first part, if all of these are the parts of one file.
pub fn first_part(files: &[PathBuf]) -> Option<&PathBuf> {
    let first = files.iter().find(|file| part_of(file).is_some_and(|(number, _)| number == 1))?;
    let count = part_of(first)?.1;
    let is_one =
        |file: &PathBuf| part_of(file).is_some_and(|(n, _)| sibling(first, n, count).as_ref() == Some(file));
    files.iter().all(is_one).then_some(first)
}

/// Part `number` (from 1) of the file whose first part is this.
fn sibling(first: &Path, number: u32, count: u32) -> Option<PathBuf> {
    let name = first.file_name()?.to_str()?.strip_suffix(&format!("-00001-of-{count:05}.gguf"))?;
    Some(first.with_file_name(format!("{name}-{number:05}-of-{count:05}.gguf")))
}

impl GgufFile {
    fn split_key(&self, key: &str) -> Result<Option<u64>, FileError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let wrong = || FileError::WrongValue {
            path: self.path().to_owned(),
            key: key.to_owned(),
            found: value.to_string(),
            expected: "a number".into(),
        };
        value.as_u64().ok_or_else(wrong).map(Some)
    }

    fn part_error(&self, problem: String) -> FileError {
        FileError::Part { path: self.path().to_owned(), problem }
    }

    /// Refuses a part: where bytes are in memory, there are no files beside them.
    pub(super) fn refuse_parts(&self) -> Result<(), FileError> {
        match self.split_key(COUNT)? {
            Some(count) if count > 1 => {
                Err(self
                    .part_error(format!("a part of a GGUF file in {count} parts, which only a path opens")))
            }
            _ => Ok(()),
        }
    }

    /// Opens the other parts of which this is the first.
    pub(super) fn open_parts(&mut self) -> Result<(), FileError> {
        let Some(count) = self.split_key(COUNT)?.filter(|&count| count > 1) else { return Ok(()) };
        let number = self.split_key(NUMBER)?.unwrap_or(0);
        if number != 0 {
            let part = number.saturating_add(1);
            return Err(
                self.part_error(format!("part {part} of a GGUF file in {count} parts: open the first part"))
            );
        }
        let first = self.path().to_owned();
        let architecture = self.value("general.architecture").and_then(Value::as_str).map(Box::from);
        for number in 2..=count {
            // Five digits, of which there are parts at most; the first name that is missing ends the loop.
            let path =
                u32::try_from(number).ok().and_then(|n| sibling(&first, n, u32::try_from(count).ok()?));
            let Some(path) = path else {
                let name = format!("-00001-of-{count:05}.gguf");
                let problem =
                    format!("the first part of a GGUF file in {count} parts, whose name must end in {name}");
                return Err(self.part_error(problem));
            };
            if !path.exists() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                return Err(self.part_error(format!(
                    "part {number} of {count} is missing: there is no {name} beside it"
                )));
            }
            let part = Self::map(&path).map_err(|error| match error {
                FileError::UnknownTensorType { path, tensor, found, help, architecture: None } => {
                    FileError::UnknownTensorType {
                        path,
                        tensor,
                        found,
                        help,
                        architecture: architecture.clone(),
                    }
                }
                error => error,
            })?;
            let found = (part.split_key(NUMBER)?, part.split_key(COUNT)?);
            if found != (Some(number - 1), Some(count)) {
                let say =
                    |number: Option<u64>| number.map_or("nothing".to_owned(), |number| number.to_string());
                return Err(part.part_error(format!(
                    "its keys {NUMBER} and {COUNT} are {} and {}, but part {number} of {count} has {} and {count}",
                    say(found.0),
                    say(found.1),
                    number - 1
                )));
            }
            self.add_part(part)?;
        }
        let (found, tensors) = (self.tensors().len() as u64, self.split_key(TENSORS)?);
        match tensors {
            Some(tensors) if tensors != found => Err(self.part_error(format!(
                "the {count} parts have {found} tensors, but {TENSORS} is {tensors}: a part is of another file"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DenseFormat;
    use crate::gguf::GgufWriter;

    /// Part `number` (from 0), with a tensor of four values, all of them the number.
    fn write(path: &Path, number: u16, count: u16, tensors: i32, name: &str) {
        let mut writer = GgufWriter::new();
        if number == 0 {
            writer.set("general.architecture", "llama").unwrap();
        }
        writer.set(NUMBER, number).unwrap();
        writer.set(COUNT, count).unwrap();
        writer.set(TENSORS, tensors).unwrap();
        let bytes = f32::from(number).to_le_bytes().repeat(4);
        writer.tensor(name, &[4], DenseFormat::F32, move |out| out.write_all(&bytes)).unwrap();
        writer.write(path).unwrap();
    }

    #[test]
    fn parts_are_opened_by_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = |n: u32| dir.path().join(format!("m-{n:05}-of-00003.gguf"));
        for number in 0..3 {
            write(&path(u32::from(number) + 1), number, 3, 3, &format!("t{number}"));
        }
        let open = |n: u32| GgufFile::open(&path(n)).map_err(|e| e.to_string());
        let file = open(1).unwrap();
        assert_eq!(file.tensors().len(), 3);
        assert_eq!(file.parts().map(|part| part.path().to_owned()).collect::<Vec<_>>(), [1, 2, 3].map(path));
        for number in 0..3 {
            let want = (number as f32).to_le_bytes().repeat(4);
            assert_eq!(file.tensor_bytes(&format!("t{number}")).unwrap()[..], want);
        }
        assert!(file.tensor_bytes("t3").is_err());
        assert!(open(2).unwrap_err().contains("part 2 of a GGUF file in 3 parts: open the first"));
        let bytes = std::fs::read(path(1)).unwrap();
        let error = GgufFile::parse("m".into(), bytes.clone().into()).unwrap_err().to_string();
        assert!(error.contains("3 parts"), "{error}");

        let says = |what: &[&str]| {
            let error = open(1).unwrap_err();
            assert!(what.iter().all(|what| error.contains(what)), "{error}");
        };
        write(&path(2), 1, 4, 3, "t1");
        says(&["m-00002-of-00003.gguf", "split.count", "4"]);
        write(&path(2), 1, 3, 3, "t2");
        says(&["m-00003-of-00003.gguf", "`t2` occurs twice"]);
        write(&path(2), 2, 3, 3, "t1");
        says(&["m-00002-of-00003.gguf", "split.no"]);
        write(&path(2), 1, 3, 3, "t1");
        write(&path(1), 0, 3, 4, "t0");
        says(&["3 tensors", "4"]);
        std::fs::remove_file(path(3)).unwrap();
        says(&["part 3 of 3 is missing", "m-00003-of-00003.gguf"]);
        let other = dir.path().join("other.gguf");
        std::fs::write(&other, bytes).unwrap();
        let error = GgufFile::open(&other).unwrap_err().to_string();
        assert!(error.contains("-00001-of-00003.gguf"), "{error}");
    }

    #[test]
    fn names_of_parts() {
        let of = |name: &str| part_of(Path::new(name));
        assert_eq!(of("a/m-00002-of-00013.gguf"), Some((2, 13)));
        for name in
            ["m.gguf", "m-2-of-3.gguf", "m-0000a-of-00003.gguf", "00001-of-00003.gguf", "m-00001-of-00003"]
        {
            assert_eq!(of(name), None, "{name}");
        }
        let files = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let all = files(&["d/m-00001-of-00002.gguf", "d/m-00002-of-00002.gguf"]);
        assert_eq!(first_part(&all), Some(&all[0]));
        assert_eq!(first_part(&files(&["d/m-00001-of-00002.gguf", "d/n-00002-of-00002.gguf"])), None);
        assert_eq!(first_part(&files(&["d/m-00001-of-00002.gguf", "d/m.gguf"])), None);
        assert_eq!(first_part(&files(&["d/m-00002-of-00002.gguf"])), None);
    }
}
