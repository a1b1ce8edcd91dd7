//! The user's configuration file.
//!
//! Its keys have the names of the environment variables, in lower case and without `BITNET_`. A variable that is set
//! wins over its key, and a flag wins over both.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn_manager::store::{self, PluginConfig};
use bitnet_burn_manager::{FallbackPolicy, Strict};
use bitnet_burn_manager::{MAX_THREADS, ManagerConfig};
use toml::{Table, Value};

/// The variable that names another file. If it is empty, no file is read.
const VARIABLE: &str = "BITNET_CONFIG";

/// The largest configuration file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// The manager's configuration from the environment and the user's file, and the path of this file, if there is one.
pub fn manager() -> anyhow::Result<(ManagerConfig, Option<PathBuf>)> {
    let mut config = ManagerConfig::from_env()?;
    let Some(path) = file() else { return Ok((config, None)) };
    let bytes = store::read_trusted(&path, MAX_BYTES)
        .with_context(|| format!("cannot read the configuration file {}", path.display()))?;
    let settings = std::str::from_utf8(&bytes).map_err(anyhow::Error::from).and_then(ConfigFile::parse);
    let settings =
        settings.with_context(|| format!("cannot use the configuration file {}", path.display()))?;
    settings.apply(&mut config, &|variable| std::env::var_os(variable).is_some());
    Ok((config, Some(path)))
}

/// The file to read: the one that the variable names, or the user's, if it exists.
fn file() -> Option<PathBuf> {
    match std::env::var_os(VARIABLE) {
        Some(named) => (!named.is_empty()).then(|| named.into()),
        // A file that exists and can't be read is an error, because it may hold settings that protect the user.
        None => store::default_config().filter(|path| {
            !path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        }),
    }
}

/// The content of the file.
#[derive(Debug, Default, PartialEq)]
struct ConfigFile {
    /// As [`PluginConfig::switch`] takes it.
    plugins: Option<String>,
    plugin_path: Option<Vec<PathBuf>>,
    /// The inner option is the pins file; `None` means no pins.
    plugin_pins: Option<Option<PathBuf>>,
    plugin_config: Option<String>,
    threads: Option<usize>,
    pin: Option<bool>,
    kernel: Option<String>,
    strict_mode: Option<Strict>,
    fallback: Option<FallbackPolicy>,
    /// The inner option is the directory; `None` means that nothing is kept.
    cache_dir: Option<Option<PathBuf>>,
}

const KEYS: &str = "plugins, plugin_path, plugin_pins, plugin_config, threads, pin, kernel, strict_mode, fallback, cache_dir";

impl ConfigFile {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut settings = Self::default();
        for (key, value) in &text.parse::<Table>()? {
            let wrong = |expected: &dyn Display| anyhow!("{key} = {value}: expected {expected}");
            match key.as_str() {
                "plugins" => {
                    let expected = "off, on or user, contained, or \"user,contained\"";
                    let text = value.as_str().ok_or_else(|| wrong(&expected))?;
                    PluginConfig::default().switch(text).map_err(|expected| wrong(&expected))?;
                    settings.plugins = Some(text.to_owned());
                }
                "plugin_path" => {
                    let absolute = |value: &Value| {
                        Some(PathBuf::from(value.as_str()?)).filter(|path| path.is_absolute())
                    };
                    let paths = value.as_array().and_then(|list| list.iter().map(absolute).collect());
                    settings.plugin_path = Some(paths.ok_or_else(|| wrong(&"a list of absolute paths"))?);
                }
                "plugin_pins" => settings.plugin_pins = Some(place(value).map_err(|e| wrong(&e))?),
                "plugin_config" => {
                    let text = value.as_str().filter(|text| !text.contains('\0'));
                    settings.plugin_config = Some(text.ok_or_else(|| wrong(&"text without NUL"))?.to_owned());
                }
                "cache_dir" => settings.cache_dir = Some(place(value).map_err(|e| wrong(&e))?),
                "pin" => settings.pin = Some(value.as_bool().ok_or_else(|| wrong(&"true or false"))?),
                "threads" => {
                    let threads = value.as_integer().and_then(|n| usize::try_from(n).ok());
                    let threads = threads.filter(|n| (1..=MAX_THREADS).contains(n));
                    settings.threads = Some(threads.ok_or_else(|| wrong(&"a number from 1 to 1024"))?);
                }
                "kernel" => {
                    let name = value.as_str().filter(|name| !name.is_empty());
                    settings.kernel = Some(name.ok_or_else(|| wrong(&"the name of a kernel"))?.to_owned());
                }
                "strict_mode" => {
                    settings.strict_mode = Some(match value {
                        Value::Boolean(true) => Strict::ALL,
                        Value::Boolean(false) => Strict::NONE,
                        Value::String(names) => names.parse().map_err(|expected: &str| wrong(&expected))?,
                        _ => return Err(wrong(&"true, false, or names in a string")),
                    });
                }
                "fallback" => {
                    let policy = value.as_str().ok_or_else(|| wrong(&"the name of a policy in a string"))?;
                    settings.fallback = Some(policy.parse().map_err(|expected: &str| wrong(&expected))?);
                }
                _ => bail!("there is no key `{key}` (= {value}); the keys are {KEYS}"),
            }
        }
        Ok(settings)
    }

    /// Applies the keys whose environment variables are not set.
    fn apply(self, config: &mut ManagerConfig, is_set: &dyn Fn(&str) -> bool) {
        fn set<T>(is_set: &dyn Fn(&str) -> bool, variable: &str, setting: Option<T>, apply: impl FnOnce(T)) {
            if let Some(value) = setting.filter(|_| !is_set(variable)) {
                apply(value);
            }
        }
        let plugins = &mut config.plugins;
        set(is_set, "BITNET_PLUGINS", self.plugins, |text| {
            plugins.switch(&text).expect("checked when it was read")
        });
        set(is_set, "BITNET_PLUGIN_PATH", self.plugin_path, |path| plugins.path = path);
        set(is_set, "BITNET_PLUGIN_PINS", self.plugin_pins, |pins| plugins.pins = pins);
        set(is_set, "BITNET_PLUGIN_CONFIG", self.plugin_config, |text| plugins.configuration = text);
        set(is_set, "BITNET_THREADS", self.threads, |threads| config.threads = threads);
        set(is_set, "BITNET_PIN", self.pin, |pin| config.pin = pin);
        set(is_set, "BITNET_KERNEL", self.kernel, |kernel| config.force = Some(kernel));
        set(is_set, "BITNET_STRICT_MODE", self.strict_mode, |strict| config.strict = strict);
        set(is_set, "BITNET_FALLBACK", self.fallback, |fallback| config.fallback = fallback);
        set(is_set, "BITNET_CACHE_DIR", self.cache_dir, |dir| config.cache_dir = dir);
    }
}

/// An absolute path, or `None` if the text is empty.
fn place(value: &Value) -> Result<Option<PathBuf>, &'static str> {
    match value.as_str() {
        Some("") => Ok(None),
        Some(path) if Path::new(path).is_absolute() => Ok(Some(path.into())),
        _ => Err("an absolute path, or \"\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "plugins = 'user, contained'\nplugin_path = ['/a', '/b.so']\nplugin_pins = ''\nplugin_config = 'a.b=1'\nthreads = 3\npin = true\n\
                       kernel = 'cpu/x'\nstrict_mode = 'gated-plugins'\ncache_dir = '/c'\n";

    #[test]
    fn what_the_environment_says_wins() {
        let mut config = ManagerConfig::default();
        config.plugins.pins = Some("/pins".into());
        ConfigFile::parse(ALL).unwrap().apply(&mut config, &|_| false);
        assert_eq!((config.threads, config.pin, config.force.as_deref()), (3, true, Some("cpu/x")));
        assert!(config.strict.gated_plugins && !config.strict.no_fallback);
        assert_eq!(config.cache_dir.as_deref(), Some(Path::new("/c")));
        assert_eq!(config.plugins.path, [Path::new("/a"), Path::new("/b.so")]);
        assert_eq!((config.plugins.user_dir, config.plugins.pins), (store::default_user_dir(), None));
        assert!(config.plugins.enabled && config.plugins.contained);
        assert_eq!(config.plugins.configuration, "a.b=1");

        let mut config = ManagerConfig::default();
        ConfigFile::parse(ALL).unwrap().apply(&mut config, &|variable| variable != "BITNET_THREADS");
        assert_eq!((config.threads, config.force, config.strict), (3, None, Strict::NONE));
        assert_eq!((config.cache_dir, config.plugins.path), (None, Vec::<PathBuf>::new()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("thread = 2", "no key `thread` (= 2); the keys are plugins, plugin_path"),
            ("threads = 0", "threads = 0: expected a number from 1 to 1024"),
            ("pin = 1", "pin = 1: expected true or false"),
            ("threads = '2'", "threads = \"2\": expected a number"),
            ("plugins = true", "plugins = true: expected off, on or user, contained"),
            ("plugins = 'user,container'", "expected off, on or user, contained, or \"user,contained\""),
            ("plugin_path = '/a'", "plugin_path = \"/a\": expected a list of absolute paths"),
            ("plugin_path = ['a']", "expected a list of absolute paths"),
            ("cache_dir = 'here'", "cache_dir = \"here\": expected an absolute path, or \"\""),
            ("strict_mode = 'very'", "strict_mode = \"very\": expected 1, 0, or some of no-fallback"),
            ("kernel = ''", "kernel = \"\": expected the name"),
            ("threads", "TOML parse error at line 1"),
            ("[threads]\nthreads = 1", "threads = { threads = 1 }: expected a number"),
        ] {
            let error = ConfigFile::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert_eq!(ConfigFile::parse("# nothing\n").unwrap(), ConfigFile::default());
    }
}
