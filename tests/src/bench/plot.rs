//! A figure as a picture, `NAME.svg`: on the left each pair of its first row, on the right the times behind it.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::figure::{Figure, PERCENTILES, Row, Times};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Width and height in pixels.
const SIZE: (u32, u32) = (960, 420);

/// How far the axis goes beyond the greatest value.
const ABOVE: f64 = 1.1;

const FONT: (&str, u32) = ("sans-serif", 14);

/// Draws it.
///
/// # Errors
/// What the library says.
pub(super) fn svg(figure: &Figure) -> anyhow::Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let (left, right) = area.split_horizontally(SIZE.0 / 2);
        if let Some(row) = figure.rows.first() {
            pairs(&left, figure.name, row)?;
        }
        if !figure.times.is_empty() {
            percentiles(&right, &figure.times)?;
        }
        area.present()?;
    }
    Ok(text)
}

#[allow(clippy::cast_precision_loss)] // Some tens of pairs.
fn pairs(area: &Area<'_>, name: &str, row: &Row) -> anyhow::Result<()> {
    let sides = [
        ("ours", BLUE, row.pairs.iter().map(|pair| Some(pair.ours)).collect::<Vec<_>>()),
        ("peer", RED, row.pairs.iter().map(|pair| pair.peer).collect()),
    ];
    let greatest = sides.iter().flat_map(|(_, _, values)| values).flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{name}: {}", row.what), FONT)
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0.5..row.pairs.len() as f64 + 0.5, 0.0..greatest * ABOVE)?;
    let turn = |turn: &f64| format!("{turn:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("turn")
        .y_desc(row.unit.word())
        .x_labels(row.pairs.len())
        .x_label_formatter(&turn)
        .max_light_lines(0)
        .draw()?;
    for (side, color, values) in sides {
        let points = (1..).zip(values).filter_map(|(turn, value)| Some((f64::from(turn), value?)));
        let dots: Vec<_> = points.map(|point| Circle::new(point, 3, color.filled())).collect();
        if !dots.is_empty() {
            chart.draw_series(dots)?.label(side).legend(move |at| Circle::new(at, 3, color.filled()));
        }
    }
    // Values are seldom near zero.
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::LowerRight).border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
    Ok(())
}

fn percentiles(area: &Area<'_>, all: &[Times]) -> anyhow::Result<()> {
    let greatest = all.iter().map(|times| times.ms(100.0)).fold(f64::MIN_POSITIVE, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("times by percentile", FONT)
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(64)
        .build_cartesian_2d(0..PERCENTILES.len() - 1, 0.0..greatest * ABOVE)?;
    let word = |place: &usize| PERCENTILES.get(*place).map_or_else(String::new, f64::to_string);
    chart
        .configure_mesh()
        .x_desc("percentile")
        .y_desc("ms")
        .x_labels(PERCENTILES.len())
        .x_label_formatter(&word)
        .draw()?;
    for (number, times) in all.iter().enumerate() {
        let color = Palette99::pick(number).to_rgba();
        let points = PERCENTILES.iter().enumerate().map(|(place, percentile)| (place, times.ms(*percentile)));
        let line = chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        line.label(&times.what).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    // Values are seldom near zero.
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::LowerRight).border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::figure::{Pair, Unit};
    use super::*;

    #[test]
    fn every_pair_and_every_percentile_is_drawn() {
        let pairs = [(1.0, Some(2.0)), (3.0, None), (2.0, Some(4.0))];
        let row = Row::new("it", Unit::Ms, pairs.map(|(ours, peer)| Pair { ours, peer }).to_vec());
        let times = vec![Times::of("some <times>", &[Duration::from_millis(5); 3])];
        let none = Row::new("it", Unit::Ms, Vec::new());
        let figure = |rows, times| {
            let (name, peer, history) = ("name", String::new(), String::new());
            Figure { name, peer, rows, times, history, notes: Vec::new() }
        };
        let text = svg(&figure(vec![row], times)).unwrap();
        // Five dots, and one for each of the two in the legend.
        assert_eq!(text.matches("<circle").count(), 7, "{text}");
        assert!(text.contains("99.99") && text.contains("some &lt;times&gt;"), "{text}");
        assert!(text.trim_end().ends_with("</svg>"), "{text}");
        svg(&figure(vec![none], Vec::new())).unwrap();
    }
}
