//! From a template's source, as Jinja2 reads it, to the source that minijinja is given.
//!
//! minijinja's operators make and walk values without a limit and differ from Python's in places. So each chain of
//! binary operators becomes a call of [`OPERATE`], and each list, tuple and dictionary a call of [`MAKE`]:
//! `a ~ b[1] * 2` becomes `__operate("~", a, __operate("*", b[1], 2))`. Strings get the escapes that minijinja knows,
//! every line end becomes `\n`, and transformers' `{% generation %}` becomes `{% with %}`. Lines keep their numbers.

use std::collections::BTreeSet;

/// The longest source, in bytes. The longest that are published have some 30,000.
const MAX_SOURCE: usize = 1 << 20;
/// The most tokens of a source, and of one tag: minijinja's parser recurses.
const MAX_TOKENS: usize = 1 << 15;
const MAX_TAG_TOKENS: usize = 1 << 11;
/// How deep brackets may nest.
const MAX_BRACKETS: usize = 60;

/// The function that computes a chain of operators: their names, then the operands.
pub const OPERATE: &str = "__operate";
/// The function that checks a container that a literal has made.
pub const MAKE: &str = "__make";

/// What is wrong with a source.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// From 1.
    pub line: usize,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    Str,
    Number,
    Sign,
}

struct Token<'a> {
    /// Blanks before it.
    blanks: &'a str,
    kind: Kind,
    text: String,
}

const SIGNS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",",
];
/// Tags of minijinja or Jinja2 that chat templates have no use for.
const REFUSED: [&str; 8] = ["autoescape", "block", "do", "extends", "from", "import", "include", "trans"];

/// What minijinja is given for this source.
pub fn translate(source: &str) -> Result<String, Fault> {
    if source.len() > MAX_SOURCE {
        let message = format!("it has {} bytes; at most {MAX_SOURCE} are read", source.len());
        return Err(Fault { line: 1, message });
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut lazy = BTreeSet::new();
    loop {
        let mut scan = Scan {
            rest: &source,
            line: 1,
            tokens: 0,
            out: String::new(),
            blocks: Vec::new(),
            loops: 0,
            lazy: &lazy,
            found: None,
        };
        let result = scan.template();
        let Scan { line, out, blocks, found, .. } = scan;
        if found.is_some_and(|found| lazy.insert(found)) {
            continue;
        }
        result.map_err(|message| Fault { line, message })?;
        if let Some(block) = blocks.last() {
            let message = format!("the block {} is not closed", block.name);
            return Err(Fault { line: block.line, message });
        }
        return Ok(out);
    }
}

struct Scan<'a> {
    rest: &'a str,
    line: usize,
    tokens: usize,
    out: String,
    blocks: Vec<Block>,
    /// How many loops there were.
    loops: usize,
    /// The loops, by their number, whose conditions have to be asked before each round: Jinja2 does so, minijinja asks
    /// all before the first. They become loops with an `if` inside that count their rounds themselves.
    lazy: &'a BTreeSet<usize>,
    /// One that is missing in [`lazy`](Self::lazy).
    found: Option<usize>,
}

/// A block that is open.
struct Block {
    name: String,
    line: usize,
    /// The number of a loop.
    number: usize,
    /// The names whose attributes the condition of a loop reads, if it is asked before the first round.
    reads: Vec<String>,
    /// Whether it is one of [`Scan::lazy`].
    lazy: bool,
}

impl<'a> Scan<'a> {
    /// The next `n` bytes.
    fn take(&mut self, n: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(n);
        self.line += taken.matches('\n').count();
        self.rest = rest;
        taken
    }

    fn copy(&mut self, n: usize) {
        let text = self.take(n);
        self.out.push_str(text);
    }

    fn template(&mut self) -> Result<(), String> {
        loop {
            let mut braces = self.rest.match_indices('{').map(|(at, _)| at);
            let Some(at) = braces.find(|at| self.rest[at + 1..].starts_with(['{', '%', '#'])) else {
                self.copy(self.rest.len());
                return Ok(());
            };
            self.copy(at);
            if self.rest.starts_with("{#") {
                let end = self.rest.find("#}").ok_or("a comment is not closed")?;
                self.copy(end + 2);
            } else if let Some((begin, length)) = raw(self.rest)? {
                self.copy(begin);
                // Jinja2 keeps the line end behind this tag, minijinja drops it.
                if self.rest.starts_with('\n') && !self.out.ends_with("-%}") && !self.out.ends_with("+%}") {
                    self.out.push('\n');
                }
                self.copy(length - begin);
            } else {
                let block = self.rest.starts_with("{%");
                let signed = self.rest[2..].starts_with('-') || (block && self.rest[2..].starts_with('+'));
                self.copy(2 + usize::from(signed));
                let mut tokens = self.tag(if block { "%}" } else { "}}" })?;
                self.count_rounds(&mut tokens)?;
                let text = if block { self.statement(&tokens)? } else { Line::all(&tokens).tuple()? };
                self.out.push_str(&text);
                // What `tag` left: blanks, the sign and the end.
                let end = self.rest.find(if block { "%}" } else { "}}" }).unwrap_or(0) + 2;
                // minijinja takes `{{}}` for an empty text.
                if !block && text.trim().is_empty() {
                    return Err("an expression is missing".into());
                }
                self.copy(end);
            }
        }
    }

    /// In a loop that counts its rounds itself: puts the count for `loop.index`.
    fn count_rounds(&self, tokens: &mut Vec<Token<'a>>) -> Result<(), String> {
        let inner = self.blocks.iter().rev().find(|block| matches!(block.name.as_str(), "for" | "macro"));
        let Some(block) = inner.filter(|block| block.lazy) else { return Ok(()) };
        let mut at = 0;
        while at < tokens.len() {
            let is_loop = tokens[at].kind == Kind::Name
                && tokens[at].text == "loop"
                && (at == 0 || !matches!(tokens[at - 1].text.as_str(), "." | "|"));
            if is_loop {
                let rounds = rounds(block.number);
                let attribute = tokens.get(at + 2).map_or("", |token| token.text.as_str());
                let text = match (tokens.get(at + 1).map_or("", |token| token.text.as_str()), attribute) {
                    (".", "index") => format!("{rounds}.n"),
                    (".", "index0") => format!("{OPERATE}(\"-\", {rounds}.n, 1)"),
                    (".", "first") => format!("{OPERATE}(\"==\", {rounds}.n, 1)"),
                    _ => {
                        return Err(
                            "in a loop whose `if` reads what is set in it, of `loop` only index, index0 and first \
                             are supported"
                                .into(),
                        );
                    }
                };
                tokens[at].text = text;
                tokens.drain(at + 1..at + 3);
            }
            at += 1;
        }
        Ok(())
    }

    /// The tokens up to the end of a tag.
    fn tag(&mut self, end: &str) -> Result<Vec<Token<'a>>, String> {
        let mut tokens: Vec<Token<'a>> = Vec::new();
        let mut brackets = Vec::new();
        loop {
            let blanks = self.rest.len() - self.rest.trim_start().len();
            let inner = &self.rest[blanks..];
            let sign = inner.starts_with('-') || (end == "%}" && inner.starts_with('+'));
            if brackets.is_empty() && inner[usize::from(sign)..].starts_with(end) {
                return Ok(tokens);
            }
            let blanks = self.take(blanks);
            let first = inner.chars().next().ok_or_else(|| format!("a tag is not closed with {end}"))?;
            self.tokens += 1;
            if self.tokens > MAX_TOKENS || tokens.len() == MAX_TAG_TOKENS {
                return Err(format!(
                    "it is too long: at most {MAX_TOKENS} tokens are read, and {MAX_TAG_TOKENS} in a tag"
                ));
            }
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let after_dot = blanks.is_empty() && tokens.last().is_some_and(|token| token.text == ".");
            let (kind, text) = if first.is_ascii_digit() {
                let n = if after_dot { digits(inner, 0) } else { number(inner) };
                (Kind::Number, self.take(n).to_owned())
            } else if word(first) {
                (Kind::Name, self.take(inner.find(|c| !word(c)).unwrap_or(inner.len())).to_owned())
            } else if first == '\'' || first == '"' {
                let length = string_length(inner, first).ok_or("a string is not closed")?;
                let text = unescape(&self.take(length)[1..length - 1])?;
                // Strings beside each other are one.
                if let Some(last) = tokens.last_mut().filter(|token| token.kind == Kind::Str) {
                    last.text.pop();
                    last.text.push_str(&quoted(&text)[1..]);
                    continue;
                }
                (Kind::Str, quoted(&text))
            } else {
                let sign = SIGNS.iter().find(|sign| inner.starts_with(**sign));
                let sign = *sign.ok_or_else(|| format!("unexpected character {first:?}"))?;
                match sign {
                    "(" => brackets.push(")"),
                    "[" => brackets.push("]"),
                    "{" => brackets.push("}"),
                    ")" | "]" | "}" if brackets.pop() != Some(sign) => {
                        return Err(format!("unexpected {sign:?}"));
                    }
                    _ => {}
                }
                if brackets.len() > MAX_BRACKETS {
                    return Err(format!("more than {MAX_BRACKETS} brackets are open"));
                }
                (Kind::Sign, self.take(sign.len()).to_owned())
            };
            tokens.push(Token { blanks, kind, text });
        }
    }

    /// A tag `{% ... %}`.
    fn statement(&mut self, tokens: &[Token<'_>]) -> Result<String, String> {
        let [first, rest @ ..] = tokens else { return Err("a tag is empty".into()) };
        let name = first.text.as_str();
        let blanks = first.blanks;
        let begin = format!("{blanks}{name}");
        if REFUSED.contains(&name) {
            return Err(format!("the tag {name} is not supported in chat templates"));
        }
        let at = |name: &str| at_depth_0(rest, name);
        let mut reads = Vec::new();
        let mut lazy = false;
        if name == "else" && self.blocks.last().is_some_and(|block| block.lazy) {
            return Err("`else` of a loop whose `if` reads what is set in it: not supported".into());
        }
        let text = match name {
            "generation" => format!("{blanks}with"),
            "endgeneration" => format!("{blanks}endwith"),
            // What a block sets stays in it.
            "set" if at("=").is_none() => format!("{begin}{} %}}{{% with", Line::all(rest).text()?),
            "endset" => format!("{blanks}endwith %}}{{% endset"),
            "for" => {
                let at = at("in").ok_or("for has no `in`")? + 1;
                let end = at_depth_0(&rest[at..], "if").map_or(rest.len(), |condition| at + condition);
                let (items, condition) = (&rest[at..end], &rest[end..]);
                self.loops += 1;
                lazy = self.lazy.contains(&self.loops);
                if lazy {
                    let (rounds, condition) = (rounds(self.loops), Line::all(condition).text()?);
                    let (target, items) = (verbatim(&rest[..at]), Line::all(items).text()?);
                    format!(
                        "{blanks}set {rounds} = namespace(n=0) %}}{{% for{target}{items} %}}{{%{condition} %}}\
                         {{% set {rounds}.n = {OPERATE}(\"+\", {rounds}.n, 1)"
                    )
                } else {
                    let dotted = condition.windows(2).filter(|pair| pair[1].text == ".");
                    reads.extend(dotted.map(|pair| pair[0].text.clone()));
                    begin + &verbatim(&rest[..at]) + &Line::all(&rest[at..]).text()?
                }
            }
            "set" => {
                let (target, value) = rest.split_at(at("=").map_or(0, |at| at + 1));
                let value = Line::all(value).tuple()?;
                let is_attribute = target.iter().any(|token| token.text == ".");
                let reads = |block: &&Block| is_attribute && block.reads.contains(&target[0].text);
                if let Some(block) = self.blocks.iter().find(reads) {
                    self.found = Some(block.number);
                    return Err("a loop has to be read again".into());
                }
                // A namespace may not come to contain itself.
                let value = if is_attribute { format!(" {MAKE}({value})") } else { value };
                begin + &verbatim(target) + &value
            }
            "call" if rest.first().is_some_and(|token| token.text == "(") => {
                let at = rest.iter().position(|token| token.text == ")").ok_or("call is not closed")? + 1;
                begin + &verbatim(&rest[..at]) + &Line::all(&rest[at..]).text()?
            }
            "with" | "macro" => {
                later_values(rest)?;
                begin + &Line::all(rest).text()?
            }
            _ => begin + &Line::all(rest).text()?,
        };
        match name {
            // What is left on minijinja's stack then, it does not find its way out of.
            "break" | "continue" => {
                let inner = self.blocks.iter().rev().find(|block| block.name != "if");
                if inner.is_none_or(|block| block.name != "for") {
                    return Err(format!(
                        "{name} stands in no loop, or in another block of one: not supported"
                    ));
                }
            }
            "set" if at("=").is_some() => {}
            "for" | "if" | "set" | "with" | "macro" | "call" | "filter" | "generation" => {
                self.blocks.push(Block {
                    name: name.into(),
                    line: self.line,
                    number: self.loops,
                    reads,
                    lazy,
                });
            }
            _ if name.starts_with("end") => match self.blocks.pop() {
                Some(block) if name[3..] == block.name && block.lazy => {
                    return Ok(format!("{blanks}endif %}}{{% endfor"));
                }
                Some(block) if name[3..] == block.name => {}
                Some(block) => return Err(format!("unexpected {name}: the block {} is open", block.name)),
                None => return Err(format!("unexpected {name}: no block is open")),
            },
            _ => {}
        }
        Ok(text)
    }
}

/// The namespace in which a loop counts its rounds.
fn rounds(number: usize) -> String {
    format!("__rounds_{number}")
}

/// Where this name or sign stands outside of brackets.
fn at_depth_0(tokens: &[Token<'_>], name: &str) -> Option<usize> {
    let mut depth = 0;
    tokens.iter().position(|token| {
        match token.text.as_str() {
            "(" | "[" | "{" if token.kind == Kind::Sign => depth += 1,
            ")" | "]" | "}" if token.kind == Kind::Sign => depth -= 1,
            text => return depth == 0 && token.kind != Kind::Str && text == name,
        }
        false
    })
}

/// In `with a = 1, b = a` and `macro m(a, b=a)`, Jinja2 and minijinja take other values for the last `a`.
fn later_values(tokens: &[Token<'_>]) -> Result<(), String> {
    let mut names: Vec<&str> = Vec::new();
    for (at, token) in tokens.iter().enumerate().filter(|(_, token)| token.kind == Kind::Name) {
        let text = token.text.as_str();
        if at > 0 && tokens[at - 1].text == "." {
            continue;
        }
        if names.contains(&text) {
            return Err(format!("`{text}` is used in the list that sets it: not supported"));
        }
        let next = tokens.get(at + 1).map_or("", |token| token.text.as_str());
        let begins = at == 0 || matches!(tokens[at - 1].text.as_str(), "," | "(");
        if begins && matches!(next, "=" | "," | ")") {
            names.push(text);
        }
    }
    Ok(())
}

/// How long `{% raw %}` is, and with all up to `{% endraw %}`.
fn raw(text: &str) -> Result<Option<(usize, usize)>, String> {
    /// What stands behind a tag of this name.
    fn behind<'a>(text: &'a str, name: &str) -> Option<&'a str> {
        let inner = text.strip_prefix("{%")?;
        let inner =
            inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start().strip_prefix(name)?.trim_start();
        inner.strip_prefix(['-', '+']).unwrap_or(inner).strip_prefix("%}")
    }
    let Some(inside) = behind(text, "raw") else { return Ok(None) };
    let ends = inside.match_indices("{%").filter_map(|(at, _)| behind(&inside[at..], "endraw"));
    match ends.into_iter().next() {
        Some(rest) => Ok(Some((text.len() - inside.len(), text.len() - rest.len()))),
        None => Err("raw has no endraw".into()),
    }
}

fn digits(text: &str, from: usize) -> usize {
    let rest = &text[from..];
    from + rest.find(|c: char| !(c.is_ascii_digit() || c == '_')).unwrap_or(rest.len())
}

/// How long a number is.
fn number(text: &str) -> usize {
    if text.starts_with("0x") || text.starts_with("0X") {
        let rest = &text[2..];
        return 2 + rest.find(|c: char| !(c.is_ascii_hexdigit() || c == '_')).unwrap_or(rest.len());
    }
    if ["0b", "0B", "0o", "0O"].iter().any(|prefix| text.starts_with(prefix)) {
        return digits(text, 2);
    }
    let mut end = digits(text, 0);
    let digit = |at: usize| text[at..].starts_with(|c: char| c.is_ascii_digit());
    if text[end..].starts_with('.') && digit(end + 1) {
        end = digits(text, end + 1);
    }
    if text[end..].starts_with(['e', 'E']) {
        let sign = usize::from(text[end + 1..].starts_with(['+', '-']));
        if digit(end + 1 + sign) {
            end = digits(text, end + 1 + sign);
        }
    }
    end
}

/// How long a string with its quotes is.
fn string_length(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// A string as minijinja reads it.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn verbatim(tokens: &[Token<'_>]) -> String {
    tokens.iter().flat_map(|token| [token.blanks, token.text.as_str()]).collect()
}

/// What stands before a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// An operator, an opening bracket, or nothing.
    Begin,
    Operand,
    /// The name of a test, behind `is`.
    Test,
}

/// How tight operators bind: comparisons, `+` and `-`, `~`, `*` and its like.
const LEVELS: usize = 4;

fn level(operator: &str) -> Option<usize> {
    match operator {
        "==" | "!=" | "<" | "<=" | ">" | ">=" => Some(0),
        "+" | "-" => Some(1),
        "~" => Some(2),
        "*" | "/" | "//" | "%" => Some(3),
        _ => None,
    }
}

/// Expressions beside each other, up to a closing bracket.
struct Line<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
    out: String,
    /// The operand that is being read.
    operand: String,
    before: Before,
    /// For each level the operators, and the operands before them.
    chains: [(Vec<&'t str>, Vec<String>); LEVELS],
    commas: bool,
}

impl<'t, 'a> Line<'t, 'a> {
    fn new(tokens: &'t [Token<'a>], at: usize) -> Self {
        Self {
            tokens,
            at,
            out: String::new(),
            operand: String::new(),
            before: Before::Begin,
            chains: Default::default(),
            commas: false,
        }
    }

    fn all(tokens: &'t [Token<'a>]) -> Self {
        Self::new(tokens, 0)
    }

    fn text(mut self) -> Result<String, String> {
        self.read()?;
        Ok(self.out)
    }

    /// With commas it is a tuple.
    fn tuple(mut self) -> Result<String, String> {
        self.read()?;
        Ok(if self.commas { format!(" {MAKE}(({}))", self.out) } else { self.out })
    }

    /// The operand that ends here, with the chains of this level and those that bind tighter.
    fn chain(&mut self, from: usize) -> Result<String, String> {
        let mut text = std::mem::take(&mut self.operand);
        for (operators, operands) in self.chains[from..].iter_mut().rev() {
            if !operators.is_empty() {
                if text.trim().is_empty() {
                    return Err("an operand is missing".into());
                }
                operands.push(text);
                text = format!(" {OPERATE}(\"{}\",{})", operators.join(","), operands.join(","));
                operators.clear();
                operands.clear();
            }
        }
        Ok(text)
    }

    fn read(&mut self) -> Result<(), String> {
        while let Some(token) = self.tokens.get(self.at) {
            let Token { blanks, kind, text } = token;
            let follows = |text: &str| self.tokens.get(self.at + 1).is_some_and(|next| next.text == text);
            let after_dot = self.at > 0 && matches!(self.tokens[self.at - 1].text.as_str(), "." | "|");
            let is_keyword = *kind == Kind::Name && !after_dot;
            if is_keyword && matches!(text.as_str(), "varargs" | "kwargs") {
                return Err(format!("`{text}` is not supported"));
            }
            let operator = match text.as_str() {
                "in" if is_keyword => Some((0, "in")),
                "not" if is_keyword && self.before != Before::Begin && follows("in") => {
                    self.at += 1;
                    Some((0, "not in"))
                }
                text if *kind == Kind::Sign && self.before != Before::Begin => {
                    level(text).map(|level| (level, text))
                }
                _ => None,
            };
            self.at += 1;
            if let Some((level, operator)) = operator {
                let operand = self.chain(level + 1)?;
                self.operand.push_str(blanks);
                let (operators, operands) = &mut self.chains[level];
                operators.push(operator);
                operands.push(operand);
                self.before = Before::Begin;
                continue;
            }
            let ends = match kind {
                Kind::Name if !is_keyword => false,
                Kind::Name => {
                    matches!(text.as_str(), "and" | "or" | "not" | "if" | "else")
                        || (text == "recursive" && self.before == Before::Operand)
                }
                Kind::Sign => matches!(text.as_str(), "," | ":" | "="),
                Kind::Str | Kind::Number => false,
            };
            if ends {
                self.commas |= text == ",";
                let chain = self.chain(0)?;
                self.out.push_str(&chain);
                self.out.push_str(blanks);
                self.out.push_str(text);
                self.before = Before::Begin;
                continue;
            }
            self.operand.push_str(blanks);
            match (kind, text.as_str()) {
                (Kind::Sign, "(" | "[" | "{") => {
                    let mut inner = Line::new(self.tokens, self.at);
                    inner.read()?;
                    self.at = inner.at + 1;
                    let close = self.tokens.get(inner.at).map_or("", |token| token.text.as_str());
                    let is_tuple = inner.commas || inner.out.trim().is_empty();
                    let literal = match (text.as_str(), self.before) {
                        ("(", Before::Begin) => is_tuple,
                        ("(", _) => false,
                        (_, before) => before != Before::Operand,
                    };
                    let text = format!("{text}{}{close}", inner.out);
                    self.operand.push_str(&if literal { format!("{MAKE}({text})") } else { text });
                    self.before = Before::Operand;
                }
                (Kind::Sign, ")" | "]" | "}") => {
                    self.at -= 1;
                    break;
                }
                (Kind::Name, "is") if is_keyword && self.before != Before::Begin => {
                    self.operand.push_str("is");
                    let negated = self.tokens.get(self.at).is_some_and(|next| next.text == "not");
                    let end = self.tokens.len().min(self.at + 1 + usize::from(negated));
                    self.operand.push_str(&verbatim(&self.tokens[self.at..end]));
                    self.at = end;
                    self.before = Before::Test;
                }
                (Kind::Sign, _) => {
                    self.operand.push_str(text);
                    self.before = Before::Begin;
                }
                _ => {
                    self.operand.push_str(text);
                    self.before = Before::Operand;
                }
            }
        }
        let chain = self.chain(0)?;
        self.out.push_str(&chain);
        Ok(())
    }
}
/// Python's escapes (`unicode-escape`).
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let mut chars = after.chars();
        let c = chars.next().unwrap_or('\\');
        rest = chars.as_str();
        let hex = |digits: usize| -> Result<char, String> {
            let code = rest.get(..digits).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
            let code = code.and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32);
            code.ok_or_else(|| format!("a string has an escape \\{c} that is not a character"))
        };
        let (character, length) = match c {
            '\n' => continue,
            'x' => (hex(2)?, 2),
            'u' => (hex(4)?, 4),
            'U' => (hex(8)?, 8),
            '0'..='7' => {
                let length = after.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let code = after[..length].bytes().fold(0, |code, b| code * 8 + u32::from(b - b'0'));
                (char::from_u32(code).unwrap_or('\0'), length - 1)
            }
            'a' => ('\u{7}', 0),
            'b' => ('\u{8}', 0),
            'f' => ('\u{c}', 0),
            'n' => ('\n', 0),
            'r' => ('\r', 0),
            't' => ('\t', 0),
            'v' => ('\u{b}', 0),
            '\\' | '\'' | '"' => (c, 0),
            'N' => return Err("a string has an escape \\N: write the character itself".into()),
            _ if !c.is_ascii() => {
                return Err(format!("a string has a backslash before {c:?}: double it"));
            }
            _ => {
                out.push('\\');
                (c, 0)
            }
        };
        out.push(character);
        rest = &rest[length..];
    }
    out.push_str(rest);
    Ok(out)
}
