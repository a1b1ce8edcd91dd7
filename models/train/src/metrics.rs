//! What a run measured: a CSV that a step adds a line to, and its plot.

use std::fs::File;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::TrainError;

const CSV: &str = "metrics.csv";
const PLOT: &str = "loss.svg";

/// A step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean -ln p of the step's tokens, before the step.
    pub loss: f64,
    /// Mean divergence of the step's tokens from the teacher's probabilities, in nats (times the temperature squared), before
    /// the step.
    pub divergence: Option<f64>,
    /// Learning rate.
    pub learning_rate: f64,
    /// Norm of all gradients, before clipping.
    pub gradient_norm: f64,
    /// How far weights and activations were quantised: 1 is ternary and int8.
    pub quantised: f64,
    /// The share of the ternary codes that this step changed; of steps before an evaluation.
    pub flipped: Option<f64>,
    /// Tokens a second of this step.
    pub tokens_per_second: f64,
    /// Mean -ln p of a token of the validation set, after the step.
    pub validation_loss: Option<f64>,
    /// e to that.
    pub validation_perplexity: Option<f64>,
}

/// The steps of a run, in memory and in its `metrics.csv`.
#[derive(Debug)]
pub struct Metrics {
    dir: PathBuf,
    rows: Vec<Row>,
    writer: csv::Writer<File>,
}

impl Metrics {
    /// Takes the file up again after `step`; later lines are dropped, since their steps are done again.
    pub(super) fn resume(dir: &Path, step: u64) -> Result<Self, TrainError> {
        let path = dir.join(CSV);
        let mut rows = if path.exists() { Self::read(dir)? } else { Vec::new() };
        rows.retain(|row| row.step <= step);
        let mut writer = Vec::new();
        {
            let mut csv = csv::Writer::from_writer(&mut writer);
            let written = rows.iter().try_for_each(|row| csv.serialize(row));
            written.and_then(|()| Ok(csv.flush()?)).map_err(|e| failed(&path, e))?;
        }
        crate::store::write_file(&path, &writer)?;
        let file = File::options().append(true).open(&path).map_err(TrainError::io(&path, "open"))?;
        let writer = csv::WriterBuilder::new().has_headers(rows.is_empty()).from_writer(file);
        Ok(Self { dir: dir.to_owned(), rows, writer })
    }

    /// The steps in a run's directory.
    ///
    /// # Errors
    /// If there is no `metrics.csv`, or it can't be read.
    pub fn read(dir: &Path) -> Result<Vec<Row>, TrainError> {
        let path = dir.join(CSV);
        let mut reader = csv::Reader::from_path(&path).map_err(|e| failed(&path, e))?;
        // A last line that a killed process did not finish is none.
        Ok(reader.deserialize().map_while(Result::ok).collect())
    }

    /// The steps.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(super) fn add(&mut self, row: Row) -> Result<(), TrainError> {
        let path = self.dir.join(CSV);
        self.writer.serialize(&row).map_err(|e| failed(&path, e))?;
        self.rows.push(row);
        self.flush()
    }

    pub(super) fn flush(&mut self) -> Result<(), TrainError> {
        self.writer.flush().map_err(TrainError::io(&self.dir.join(CSV), "write"))
    }

    pub(super) fn plot(&self, name: &str) -> Result<(), TrainError> {
        let curve = Curve { name: name.to_owned(), rows: self.rows.clone() };
        crate::store::write_file(&self.dir.join(PLOT), plot(&[curve], &[]).as_bytes())
    }
}

fn failed(path: &Path, error: csv::Error) -> TrainError {
    let error = match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        other => std::io::Error::other(format!("{other:?}")),
    };
    TrainError::Io { path: path.to_owned(), action: "read or write", error }
}

/// A run in a plot.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// Its steps.
    pub rows: Vec<Row>,
}

/// An SVG of the loss of one or several runs over the tokens that they have seen: that of the steps as a
/// moving mean, thin, and that of the validation set as a line with points; and horizontal lines at given
/// losses, such as the entropy of the text.
pub fn plot(curves: &[Curve], levels: &[(String, f64)]) -> String {
    let mut svg = String::new();
    draw(&mut svg, curves, levels).expect("drawing into a string can't fail");
    svg
}

fn draw(
    svg: &mut String,
    curves: &[Curve],
    levels: &[(String, f64)],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    // Told apart also by those who do not see colours as most do (Okabe and Ito).
    const COLOURS: [RGBColor; 4] =
        [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];
    let smooth = |rows: &[Row]| -> Vec<(f64, f64)> {
        let width = (rows.len() / 100).max(1);
        let mean = |rows: &[Row]| rows.iter().map(|row| row.loss).sum::<f64>() / rows.len() as f64;
        (0..rows.len())
            .step_by(width)
            .map(|i| {
                let part = &rows[i..(i + width).min(rows.len())];
                (part[part.len() - 1].tokens as f64, mean(part))
            })
            .collect()
    };
    let validation = |rows: &[Row]| -> Vec<(f64, f64)> {
        rows.iter().filter_map(|row| Some((row.tokens as f64, row.validation_loss?))).collect()
    };
    let all: Vec<(f64, f64)> = curves
        .iter()
        .flat_map(|curve| smooth(&curve.rows).into_iter().chain(validation(&curve.rows)))
        .collect();
    let x_max = all.iter().map(|p| p.0).fold(1.0, f64::max);
    // The first steps are far above the rest, and of no interest.
    let mut sorted: Vec<f64> = all.iter().map(|p| p.1).collect();
    sorted.sort_by(f64::total_cmp);
    let top = sorted.get(sorted.len() * 9 / 10).copied().unwrap_or(1.0) * 1.15;
    let bottom = levels.iter().map(|l| l.1).chain(sorted.first().copied()).fold(f64::INFINITY, f64::min);
    let bottom = if bottom.is_finite() { (bottom * 0.9).max(0.0) } else { 0.0 };
    let top = if top > bottom { top } else { bottom + 1.0 };
    let within = |points: Vec<(f64, f64)>| points.into_iter().filter(move |p| p.1 <= top);

    let root = SVGBackend::with_string(svg, (800, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..x_max, bottom..top)?;
    chart
        .configure_mesh()
        .x_desc("tokens (millions)")
        .y_desc("loss (nats per token)")
        .x_label_formatter(&|x| format!("{:.2}", x / 1e6))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.1))
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        chart.draw_series(LineSeries::new(within(smooth(&curve.rows)), colour.mix(0.35)))?;
        let points = validation(&curve.rows);
        let last = points.last().map_or(String::new(), |p| format!(": {:.3}", p.1));
        chart
            .draw_series(LineSeries::new(within(points.clone()), colour.stroke_width(2)))?
            .label(format!("{}, validation{last}", curve.name))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(within(points).map(|p| Circle::new(p, 2, colour.filled())))?;
    }
    for (name, level) in levels {
        chart
            .draw_series(LineSeries::new([(0.0, *level), (x_max, *level)], BLACK.mix(0.6)))?
            .label(format!("{name}: {level:.3}"))
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.mix(0.6)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .draw()?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> Row {
        Row {
            step,
            tokens: step * 100,
            loss: 5.0 / step as f64,
            divergence: None,
            learning_rate: 1e-3,
            gradient_norm: 1.0,
            quantised: 1.0,
            flipped: None,
            tokens_per_second: 10.0,
            validation_loss: step.is_multiple_of(2).then_some(4.0 / step as f64),
            validation_perplexity: None,
        }
    }

    #[test]
    fn lines_behind_a_checkpoint_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::resume(dir.path(), 0).unwrap();
        (1..=5).for_each(|step| metrics.add(row(step)).unwrap());
        assert_eq!(Metrics::read(dir.path()).unwrap(), metrics.rows());
        drop(metrics);
        // Killed within a line.
        let path = dir.path().join(CSV);
        let mut text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 6);
        text.push_str("6,600,0.8");
        std::fs::write(&path, text).unwrap();
        let mut metrics = Metrics::resume(dir.path(), 3).unwrap();
        assert_eq!(metrics.rows().len(), 3);
        metrics.add(row(4)).unwrap();
        let rows = Metrics::read(dir.path()).unwrap();
        assert_eq!(rows, (1..=4).map(row).collect::<Vec<_>>());
    }

    #[test]
    fn a_plot_shows_names_and_levels() {
        let curve = Curve { name: "ternary".into(), rows: (1..=300).map(row).collect() };
        let svg = plot(&[curve], &[("entropy".into(), 0.01)]);
        assert!(svg.contains("ternary, validation: 0.013") && svg.contains("entropy: 0.010"), "{svg}");
        assert!(svg.contains("<polyline") && svg.ends_with("</svg>\n"));
        assert!(plot(&[Curve { name: "empty".into(), rows: Vec::new() }], &[]).contains("</svg>"));
    }
}
