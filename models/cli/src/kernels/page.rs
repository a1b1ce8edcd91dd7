//! The explanations as an HTML page.

use std::fmt::Write as _;

use bitnet_burn_engine::bench::Roof;
use bitnet_burn_engine::text::{count, human_bytes};

use super::{CandidateRow, Explanation, Limit, Output, roof_text};
use crate::page::{self, escape};

/// The page.
pub fn html(output: &Output, roof: &Roof) -> String {
    let title = match &output.model {
        Some(model) => format!("Kernels for {model}"),
        None => "Kernels".into(),
    };
    let intro = format!(
        "<p>{}, {}. Limits: {}.</p>\n<p class=\"muted\">Measured by <code>bitnet kernels --html</code>, version {}.</p>",
        escape(output.cpu.model),
        count(output.threads as u64, "thread"),
        roof_text(roof),
        env!("CARGO_PKG_VERSION"),
    );
    let mut body = String::new();
    let shapes = shapes(&output.explanations);
    push_summary(&mut body, &shapes);
    body.push_str(LEGEND);
    for shape in &shapes {
        push_shape(&mut body, shape, roof);
    }
    push_table(&mut body, &output.explanations);
    page::html(&title, &intro, &body)
}

const LEGEND: &str = "\
<p class=\"legend\"><span><i class=\"key chosen\"></i> chosen</span><span><i class=\"key\"></i> other candidates</span>\
<span><i class=\"key roof\"></i> the roof: the limit of this machine</span></p>
<p class=\"muted\">Longer is faster. For one token, a matmul must read all of its weights, so the roof is the memory's \
read bandwidth. For many tokens it must multiply, so the roof is multiply-adds on registers alone, without loads. Each \
weight counts as 2 bits.</p>
";

/// Groups the explanations by shape.
fn shapes(explanations: &[Explanation]) -> Vec<Vec<&Explanation>> {
    let mut shapes: Vec<Vec<&Explanation>> = Vec::new();
    let shape = |e: &Explanation| (e.weights.n, e.weights.k);
    for explanation in explanations {
        match shapes.iter_mut().find(|known| shape(known[0]) == shape(explanation)) {
            Some(known) => known.push(explanation),
            None => shapes.push(vec![explanation]),
        }
    }
    shapes
}

fn push_summary(page: &mut String, shapes: &[Vec<&Explanation>]) {
    page.push_str(
        "<div class=\"wide\"><table class=\"summary\">\n<thead><tr><th>Weights</th><th>Used by</th><th>Tokens</th><th>Kernel</th>\
         <th class=\"n\">Time</th><th class=\"n\">Of the roof</th></tr></thead>\n<tbody>\n",
    );
    for explanations in shapes {
        for (i, explanation) in explanations.iter().enumerate() {
            let Explanation { weights, m, chosen, candidates, .. } = explanation;
            page.push_str("<tr>");
            if i == 0 {
                // Writing to a string can't fail.
                let _ = write!(
                    page,
                    "<th rowspan=\"{rows}\">{} &times; {}</th><td rowspan=\"{rows}\">{}</td>",
                    weights.n,
                    weights.k,
                    weights.used_by().map_or("&ndash;".into(), |used_by| escape(&used_by)),
                    rows = explanations.len(),
                );
            }
            let row = candidates.iter().find(|c| c.kernel == *chosen);
            let time = row.and_then(|row| row.median_ns).map_or("&ndash;".into(), time);
            let of_roof = row.and_then(|row| row.speed?.of_roof).map_or("&ndash;".into(), percent);
            let _ = writeln!(
                page,
                "<td>{m}</td><td><code>{}</code></td><td class=\"n\">{time}</td><td class=\"n\">{of_roof}</td></tr>",
                escape(chosen)
            );
        }
    }
    page.push_str("</tbody>\n</table></div>\n");
}

fn push_shape(page: &mut String, explanations: &[&Explanation], roof: &Roof) {
    let Explanation { weights, layout, weight_bytes, .. } = explanations[0];
    let used_by = weights.used_by().map(|used_by| format!("{}, ", escape(&used_by))).unwrap_or_default();
    let _ = writeln!(
        page,
        "<section>\n<h2>{} &times; {}</h2>\n<p class=\"muted\">{used_by}kept in the layout <code>{}</code>, {} each</p>",
        weights.n,
        weights.k,
        escape(layout),
        human_bytes(*weight_bytes as u64),
    );
    for explanation in explanations {
        push_chart(page, explanation, roof);
    }
    page.push_str("</section>\n");
}

fn push_chart(page: &mut String, explanation: &Explanation, roof: &Roof) {
    let Explanation { m, chosen, reason, candidates, rows_measured, .. } = explanation;
    let limit = Limit::of(*rows_measured);
    let tokens = match m {
        1 => "One token (decode)".into(),
        m => format!("{m} tokens at once (prefill)"),
    };
    let top = limit.roof(roof);
    let fastest = candidates.iter().filter_map(|c| Some(c.speed?.g_per_s)).fold(0.0, f64::max);
    // Some room after the longest bar, so that the roof's line is inside the frame.
    let scale = fastest.max(top.unwrap_or(0.0)).max(f64::MIN_POSITIVE) * 1.04;
    let _ = writeln!(
        page,
        "<figure>\n<figcaption><h3>{tokens}</h3><p><code>{}</code> is {}.<span class=\"muted\"> {}.</span></p></figcaption>",
        escape(chosen),
        escape(reason),
        capitalised(&escape(&explanation.provenance())),
    );
    if let Some(top) = top {
        let what = match limit {
            Limit::Memory => "memory reads",
            Limit::MultiplyAdds => "registers multiply",
        };
        let at = top / scale * 100.0;
        let _ = writeln!(
            page,
            "<div class=\"row top\"><span></span><span class=\"axis\"><b style=\"right:{:.2}%\">{what} {} {}</b></span></div>",
            100.0 - at,
            number(top),
            limit.unit(),
        );
    }
    let line = top.map_or(String::new(), |top| format!(" style=\"--at:{:.2}%\"", top / scale * 100.0));
    for candidate in candidates {
        push_bar(page, candidate, candidate.kernel == *chosen, scale, limit, &line);
    }
    if top.is_some_and(|top| fastest > top) {
        page.push_str(
            "<p class=\"muted\">Faster than the roof: a cache held the weights, the layout uses less than 2 bits per weight, \
             or the machine was busier while the roof was measured.</p>\n",
        );
    }
    page.push_str("</figure>\n");
}

fn push_bar(page: &mut String, candidate: &CandidateRow, chosen: bool, scale: f64, limit: Limit, line: &str) {
    let CandidateRow { kernel, median_ns, speed, note, .. } = candidate;
    let class = if chosen { "row chosen" } else { "row" };
    let _ = write!(page, "<div class=\"{class}\"><span class=\"name\">{}</span>", escape(kernel));
    match speed.zip(*median_ns) {
        Some((speed, ns)) => {
            let width = speed.g_per_s / scale * 100.0;
            let of_roof = speed.of_roof.map_or(String::new(), percent);
            let _ = write!(
                page,
                "<span class=\"track\"{line}><i style=\"width:{width:.2}%\"></i></span><span class=\"n\">{} {}</span>\
                 <span class=\"n\">{of_roof}</span><span class=\"n\">{}</span>",
                number(speed.g_per_s),
                limit.unit(),
                time(ns),
            );
        }
        None => {
            let note = note.as_deref().unwrap_or("not measured");
            let _ = write!(page, "<span class=\"track\"{line}><em>{}</em></span>", escape(note));
        }
    }
    page.push_str("</div>\n");
}

fn push_table(page: &mut String, explanations: &[Explanation]) {
    page.push_str(
        "<section>\n<h2>All figures</h2>\n<div class=\"wide\"><table>\n<thead><tr><th>Weights</th><th class=\"n\">Tokens\
         </th><th class=\"n\">Measured with</th><th>Kernel</th><th>Layout</th><th class=\"n\">Median</th><th class=\"n\">Runs\
         </th><th class=\"n\">Speed</th><th class=\"n\">Of the roof</th><th>Note</th></tr></thead>\n<tbody>\n",
    );
    for explanation in explanations {
        let Explanation { m, weights, rows_measured, chosen, candidates, .. } = explanation;
        let limit = Limit::of(*rows_measured);
        for candidate in candidates {
            let CandidateRow { kernel, layout, median_ns, runs, speed, note, .. } = candidate;
            let class = if kernel == chosen { " class=\"chosen\"" } else { "" };
            let _ = writeln!(
                page,
                "<tr{class}><td>{} &times; {}</td><td class=\"n\">{m}</td><td class=\"n\">{rows_measured}</td><td>\
                 <code>{}</code></td><td><code>{}</code></td><td class=\"n\">{}</td><td class=\"n\">{runs}</td>\
                 <td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
                weights.n,
                weights.k,
                escape(kernel),
                escape(layout),
                median_ns.map_or("&ndash;".into(), time),
                speed.map_or("&ndash;".into(), |s| format!("{} {}", number(s.g_per_s), limit.unit())),
                speed.and_then(|s| s.of_roof).map_or("&ndash;".into(), percent),
                note.as_deref().map(escape).unwrap_or_default(),
            );
        }
    }
    page.push_str("</tbody>\n</table></div>\n</section>\n");
}

/// A number with about three digits.
fn number(value: f64) -> String {
    if value >= 99.95 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn percent(fraction: f64) -> String {
    format!("{:.0}&nbsp;%", fraction * 100.0)
}

fn time(ns: u64) -> String {
    let us = ns as f64 / 1e3;
    if us < 999.5 { format!("{}&nbsp;&micro;s", number(us)) } else { format!("{}&nbsp;ms", number(us / 1e3)) }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(capitalised("measured"), "Measured");
        assert_eq!(number(99.94), "99.9");
        assert_eq!(time(999_499), "999&nbsp;&micro;s");
        assert_eq!(time(999_500), "1.0&nbsp;ms");
    }
}
