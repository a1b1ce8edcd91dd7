//! HTML pages with bars: one file without scripts, which needs no network.

/// A page with a title, which is escaped here, and two pieces of markup: what stands under the title, and the rest.
pub fn html(title: &str, intro: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header>\n<h1>{title}</h1>\n{intro}\n</header>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// Escapes text for HTML, because names come from files, plugins and the system.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

const STYLE: &str = "\
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #1c2127; --muted: #626b75; --line: #e3e2dd;
  --bar: #bcc6d1; --chosen: #0e7a70; --roof: #b4530b; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #e4e7ea; --muted: #929ba5; --line: #2c3238;
  --bar: #47525e; --chosen: #2bb8a6; --roof: #f0a23a; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 0; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .2rem 0; }
code { font: .93em ui-monospace, monospace; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
section { margin-top: 3rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
figure { margin: 1.6rem 0 0; }
figcaption { margin-bottom: .5rem; }
.row { display: grid; grid-template-columns: 12.5rem 1fr 12rem 3.5rem 5rem; gap: .8rem; align-items: center;
  min-height: 1.75rem; }
.name { font: .87rem ui-monospace, monospace; overflow-wrap: anywhere; }
.track { position: relative; display: flex; align-items: center; align-self: stretch; }
.track i { height: 1.05rem; border-radius: 0 3px 3px 0; background: var(--bar); min-width: 1px; }
.track em { color: var(--muted); font-style: normal; font-size: .85rem; position: relative; z-index: 1;
  background: var(--page); padding-right: .5rem; }
.track[style]::after { content: ''; position: absolute; left: var(--at); top: 0; bottom: 0;
  border-left: 2px dashed var(--roof); }
.axis { position: relative; align-self: stretch; }
.axis b { position: absolute; bottom: .1rem; white-space: nowrap; font-weight: 600; font-size: .85rem;
  color: var(--roof); }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.chosen .name { font-weight: 700; }
.chosen .track i { background: var(--chosen); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
th.n, td.n { text-align: right; }
tbody th, td code { white-space: nowrap; }
tr.chosen td { font-weight: 600; }
.summary { margin: .8rem 0 1.6rem; min-width: 60%; }
.wide { overflow-x: auto; margin-top: .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin-bottom: .6rem; }
.key { display: inline-block; width: 1.4rem; height: .8rem; border-radius: 2px; background: var(--bar);
  margin-right: .3rem; }
.key.chosen { background: var(--chosen); }
.key.roof { background: none; width: 0; border-left: 2px dashed var(--roof); border-radius: 0; margin: 0 .5rem; }
@media (max-width: 50rem) {
  .row { grid-template-columns: 1fr auto auto; gap: 0 .8rem; margin-bottom: .5rem; }
  .row .name, .row.top > :first-child { grid-column: 1 / -1; }
  .track { grid-column: 1 / -1; min-height: 1.1rem; }
  .axis { grid-column: 1 / -1; min-height: 1.3rem; }
}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_name_is_markup() {
        assert_eq!(escape("<b a='1'>&\"\u{1b}"), "&lt;b a=&#39;1&#39;&gt;&amp;&quot;\u{fffd}");
        assert!(html("<b>", "", "<i>").contains("<h1>&lt;b&gt;</h1>\n\n</header>\n<i></main>"));
    }
}
