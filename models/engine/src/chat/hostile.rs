//! Templates that were written to harm.

use super::{ChatError, ChatTemplate, Message, TemplateTokens};

fn render(source: &str) -> Result<String, ChatError> {
    ChatTemplate::named("t.jinja", source)?.render(
        &[Message::new("user", "Hi")],
        &TemplateTokens::default(),
        true,
    )
}

/// Each is an error that names the template, and none takes memory or stack beyond the limits.
#[test]
fn hostile_templates_are_errors() {
    let loop_of = |n: usize, body: &str| {
        format!(
            "{{% set ns = namespace(x='aaaaaaaa', l=[1]) %}}{{% for i in range({n}) %}}{body}{{% endfor %}}"
        )
    };
    let nested =
        |begin: &str, n: usize, end: &str| format!("{{{{ {}1{} }}}}", begin.repeat(n), end.repeat(n));
    let templates = [
        // Panics of the library.
        "{% import 'a' as 1 %}".into(),
        "{% for x in [1] %}{% with %}{% break %}{% endwith %}{% endfor %}".into(),
        // Stack.
        format!("{{{{ a{} }}}}", "~a".repeat(40_000)),
        format!("{{{{ a{} }}}}", " and a".repeat(40_000)),
        format!("{{{{ a{} }}}}", "|trim".repeat(40_000)),
        nested("[", 100_000, "]"),
        nested("(", 1_000, ")"),
        nested("{1:", 1_000, "}"),
        "{% if a %}".repeat(10_000) + &"{% endif %}".repeat(10_000),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        loop_of(60_000, "{% set ns.l = [ns.l] %}"),
        loop_of(60_000, "{% set ns = namespace(x=ns) %}"),
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns == ns }}{{ ns }}".into(),
        // Memory.
        "{{ 'x' | indent(100000000000) }}".into(),
        "{{ 'x' | indent(100000000000, true) }}".into(),
        "{{ 'x' * 100000000000 }}".into(),
        "{{ 'x' * 90000000 ~ 'x' * 90000000 }}".into(),
        "{{ [1] * 100000000 }}".into(),
        "{% for x in [1] * 100000000 %}{% endfor %}".into(),
        "{{ 'x'.center(10000000000) }}{{ 'x'.zfill(10000000000) }}".into(),
        "{{ '%1000000000d' | format(1) }}".into(),
        "{{ '%*d' | format(1000000000, 1) }}".into(),
        "{{ '{:1000000000}'.format(1) }}".into(),
        "{{ 'aaaaaaaaaaaaaaaa' | replace('a', 'a'*10000) | replace('a', 'a'*10000) | length }}".into(),
        "{{ ('a' * 100000).replace('', 'a' * 100000) }}".into(),
        "{{ range(100000) | join('x' * 100000) }}".into(),
        "{{ ('x' * 100000).join('y' * 100000) }}".into(),
        "{{ [1] | tojson(indent=10000000000) }}".into(),
        "{% for m in range(1000) %}{{ range(100000) | list }}{% endfor %}".into(),
        "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}".into(),
        loop_of(40, "{% set ns.x = ns.x ~ ns.x %}") + "{{ ns.x | length }}",
        loop_of(40, "{% set ns.x = ns.x + ns.x %}") + "{{ ns.x | length }}",
        loop_of(40, "{% set ns.x = ns.x * 2 %}") + "{{ ns.x | length }}",
        loop_of(40, "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}") + "{{ ns.x | length }}",
        loop_of(40, "{% set ns.x = '%s%s' % (ns.x, ns.x) %}") + "{{ ns.x | length }}",
        loop_of(40, "{% set ns.l = ns.l + ns.l %}") + "{{ ns.l | length }}",
        loop_of(40, "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
        loop_of(40, "{% set ns.l = (ns.l, ns.l) %}") + "{{ ns.l ~ '' }}",
        loop_of(40, "{% set ns.l = {'a': ns.l, 'b': ns.l} %}") + "{{ ns.l == ns.l }}",
        loop_of(40, "{% set ns.l = dict(a=ns.l, b=ns.l) %}") + "{{ ns.l | tojson }}",
        "{% macro m(x) %}{{ m(x + x) }}{% endmacro %}{{ m([1, 2, 3]) }}".into(),
        "{% set a = [1] * 100000 %}{{ [a] * 100000 | upper }}".into(),
        "{% set a = [1] * 15000 %}{{ ([[a]] * 15000) == ([[a + [1]]] * 15000) }}{{ ([a] * 99999) | upper }}"
            .into(),
    ];
    for source in templates {
        let shown: String = source.chars().take(100).collect();
        match render(&source) {
            Ok(text) => panic!("{shown}: {} bytes", text.len()),
            Err(e) => assert!(e.to_string().starts_with("t.jinja"), "{shown}: {e}"),
        }
    }
    // These are harmless.
    assert_eq!(render(&format!("{{{{ {}a }}}}", "not ".repeat(2_000))).unwrap(), "False");
    let long = "x".repeat(2 << 20);
    assert!(render(&long).unwrap_err().to_string().contains("bytes"));
}
