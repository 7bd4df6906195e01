//! How plots look: one palette, text on the lines themselves, readable on light and dark pages.

use std::fmt::Write as _;

use anyhow::{Result, anyhow};
use plotters::{
    coord::{
        Shift,
        ranged1d::{DefaultFormatting, KeyPointHint, Ranged},
    },
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(super) const PAPER: RGBColor = RGBColor(255, 255, 255);
pub(super) const INK: RGBColor = RGBColor(36, 41, 47);
pub(super) const FAINT: RGBColor = RGBColor(216, 222, 228);
/// Okabe and Ito's colours, which people who see fewer of them can tell apart; sky blue is for bands.
pub(super) const BLUE: RGBColor = RGBColor(0, 114, 178);
pub(super) const SKY: RGBColor = RGBColor(86, 180, 233);
pub(super) const VERMILION: RGBColor = RGBColor(213, 94, 0);
pub(super) const ORANGE: RGBColor = RGBColor(230, 159, 0);
pub(super) const GREEN: RGBColor = RGBColor(0, 158, 115);
pub(super) const PURPLE: RGBColor = RGBColor(204, 121, 167);

/// What becomes of paper, ink and lines on a dark page.
const DARK: [(RGBColor, &str); 4] =
    [(PAPER, "#0D1117"), (INK, "#E6EDF3"), (FAINT, "#30363D"), (BLUE, "#4EA1E0")];

const FONT: &str = "sans-serif";
pub(super) const SMALL: u32 = 13;

pub(super) fn text(size: u32, color: RGBColor) -> TextStyle<'static> {
    FontDesc::from((FONT, size)).color(&color)
}

/// Text whose middle or end, and not its top left corner, is at the point.
pub(super) fn placed(style: &TextStyle<'static>, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    style.pos(Pos::new(horizontal, vertical))
}

/// Draws a picture; its title is at the top left.
pub(super) fn picture(
    size: (u32, u32),
    title: &str,
    draw: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&PAPER).map_err(|error| anyhow!("{error}"))?;
        put(&root, title, (16, 14), &text(18, INK))?;
        draw(&root.margin(44, 8, 12, 12))?;
        root.present().map_err(|error| anyhow!("{error}"))?;
    }
    Ok(themed(&svg))
}

pub(super) fn put(area: &Area<'_>, words: &str, at: (i32, i32), style: &TextStyle<'_>) -> Result<()> {
    area.draw(&Text::new(words.to_owned(), at, style.clone())).map_err(|error| anyhow!("{error}"))
}

/// Colours that follow the reader's choice of a light or a dark page.
fn themed(svg: &str) -> String {
    let mut rules = String::new();
    for (RGBColor(r, g, b), dark) in DARK {
        let light = format!("#{r:02X}{g:02X}{b:02X}");
        let _infallible =
            write!(rules, "[fill=\"{light}\"]{{fill:{dark}}}[stroke=\"{light}\"]{{stroke:{dark}}}");
    }
    let style = format!("<style>@media (prefers-color-scheme:dark){{{rules}}}</style>\n");
    match svg.split_once(">\n") {
        Some((head, rest)) => format!("{head}>\n{style}{rest}\n"),
        None => svg.to_owned(),
    }
}

/// An axis: its range, where it is marked, and how.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) ticks: Vec<f64>,
    /// Equal steps are equal factors.
    pub(super) log: bool,
    pub(super) show: fn(f64) -> String,
}

/// Plotters' own ranges choose their marks themselves, or cannot name them.
#[derive(Clone)]
struct Scale {
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.from) / (self.to - self.from);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

impl Axis {
    fn scale(&self) -> Scale {
        let ticks = self.ticks.iter().map(|&tick| self.at(tick)).collect();
        Scale { from: self.at(self.from), to: self.at(self.to), ticks }
    }

    fn at(&self, value: f64) -> f64 {
        if self.log { value.max(self.from).log10() } else { value }
    }

    fn shown(&self, at: f64) -> String {
        (self.show)(if self.log { 10f64.powf(at) } else { at })
    }
}

/// A line; points above the axis leave the picture at its top, where that is said.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) color: RGBColor,
    pub(super) points: Vec<(f64, f64)>,
    /// Drawn with gaps: what is no policy that anybody could have.
    pub(super) dashed: bool,
    /// A point with a word beside it.
    pub(super) mark: Option<((f64, f64), String)>,
}

/// The lines that lie below the top, cut where they cross it, and the places where they do.
fn cut(points: &[(f64, f64)], top: f64) -> (Vec<Vec<(f64, f64)>>, Vec<f64>) {
    let mut pieces = vec![Vec::new()];
    let mut exits = Vec::new();
    let mut before: Option<(f64, f64)> = None;
    for &(x, y) in points {
        if let Some((bx, by)) = before
            && (by <= top) != (y <= top)
        {
            let crossing = bx + (x - bx) * (top - by) / (y - by);
            if let Some(piece) = pieces.last_mut() {
                piece.push((crossing, top));
            }
            if y > top {
                exits.push(crossing);
                pieces.push(Vec::new());
            }
        }
        if y <= top
            && let Some(piece) = pieces.last_mut()
        {
            piece.push((x, y));
        }
        before = Some((x, y));
    }
    pieces.retain(|piece| piece.len() > 1);
    (pieces, exits)
}

/// Moves labels apart, from the top down, keeping their order; `least` pixels between two, none below `bottom`.
fn spread(wanted: &[i32], least: i32, bottom: i32) -> Vec<i32> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|&index| wanted[index]);
    let mut placed = wanted.to_vec();
    for pair in 1..order.len() {
        placed[order[pair]] = placed[order[pair]].max(placed[order[pair - 1]] + least);
    }
    let mut floor = bottom;
    for &index in order.iter().rev() {
        placed[index] = placed[index].min(floor);
        floor = placed[index] - least;
    }
    placed
}

/// Lines over two axes, named at their right ends.
pub(super) fn lines(title: &str, x: &Axis, y: &Axis, series: &[Series]) -> Result<String> {
    const SIZE: (u32, u32) = (900, 460);
    const NAMES: u32 = 200;
    picture(SIZE, title, |area| {
        let fail = |error: &dyn std::fmt::Display| anyhow!("{error}");
        let mut chart = ChartBuilder::on(area)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .margin_right(NAMES)
            .build_cartesian_2d(x.scale(), y.scale())
            .map_err(|e| fail(&e))?;
        chart
            .configure_mesh()
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(text(SMALL, INK))
            .axis_desc_style(text(14, INK))
            .x_desc(&x.label)
            .y_desc(&y.label)
            .x_label_formatter(&|&at| x.shown(at))
            .y_label_formatter(&|&at| y.shown(at))
            .draw()
            .map_err(|e| fail(&e))?;
        let top = y.at(y.to);
        let (mut wanted, mut names) = (Vec::new(), Vec::new());
        for one in series {
            let points: Vec<(f64, f64)> = one.points.iter().map(|&(px, py)| (x.at(px), y.at(py))).collect();
            let (pieces, exits) = cut(&points, top);
            let style = one.color.stroke_width(if one.dashed { 2 } else { 3 });
            for piece in pieces {
                if one.dashed {
                    chart.draw_series(DashedLineSeries::new(piece, 6, 5, style)).map_err(|e| fail(&e))?;
                } else {
                    chart.draw_series(LineSeries::new(piece, style)).map_err(|e| fail(&e))?;
                }
            }
            for exit in exits {
                let arrow = TriangleMarker::new((exit, top), 7, one.color.filled());
                chart.draw_series([arrow]).map_err(|e| fail(&e))?;
                let (px, py) = chart.backend_coord(&(exit, top));
                wanted.push(py + 12);
                names.push((format!("{}: {} and more", one.name, y.shown(top)), one.color, Some(px)));
            }
            if let Some((point, word)) = &one.mark {
                let at = (x.at(point.0), y.at(point.1));
                chart.draw_series([Circle::new(at, 5, one.color.filled())]).map_err(|e| fail(&e))?;
                let (px, py) = chart.backend_coord(&at);
                let style = placed(&text(SMALL, one.color), HPos::Left, VPos::Top);
                put_pixel(area, word, (px + 8, py + 4), &style)?;
            }
            if let Some(&(_, last)) = points.last()
                && last <= top
            {
                let (_, py) = chart.backend_coord(&(x.at(x.to), last));
                wanted.push(py);
                names.push((one.name.clone(), one.color, None));
            }
        }
        let (right, bottom) = chart.backend_coord(&(x.at(x.to), y.at(y.from)));
        // Names of lines that leave at the top stand there; the others share the right edge.
        let ends: Vec<usize> = (0..names.len()).filter(|&index| names[index].2.is_none()).collect();
        let at_right: Vec<i32> = ends.iter().map(|&index| wanted[index]).collect();
        for (&index, py) in ends.iter().zip(spread(&at_right, 17, bottom)) {
            let style = placed(&text(14, names[index].1), HPos::Left, VPos::Center);
            put_pixel(area, &names[index].0, (right + 8, py), &style)?;
        }
        for (index, (name, color, exit)) in names.iter().enumerate() {
            if let Some(px) = exit {
                let style = placed(&text(14, *color), HPos::Left, VPos::Top);
                put_pixel(area, name, (px + 10, wanted[index] - 8), &style)?;
            }
        }
        Ok(())
    })
}

/// Writes at a pixel of the whole picture.
pub(super) fn put_pixel(area: &Area<'_>, words: &str, at: (i32, i32), style: &TextStyle<'_>) -> Result<()> {
    let (left, top) = area.get_base_pixel();
    put(area, words, (at.0 - left, at.1 - top), style)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_leaves_the_picture_ends_at_its_top_and_one_that_returns_begins_there() {
        let (pieces, exits) = cut(&[(0.0, 1.0), (1.0, 3.0), (2.0, 1.0)], 2.0);
        assert_eq!(pieces, [vec![(0.0, 1.0), (0.5, 2.0)], vec![(1.5, 2.0), (2.0, 1.0)]]);
        assert_eq!(exits, [0.5]);
        let (pieces, exits) = cut(&[(0.0, 1.0), (1.0, 2.0)], 2.0);
        assert_eq!((pieces.len(), exits.len()), (1, 0));
    }

    #[test]
    fn names_keep_their_distance_their_order_and_stay_above_the_bottom() {
        assert_eq!(spread(&[100, 10, 12], 17, 500), [100, 10, 27]);
        assert_eq!(spread(&[100, 99], 17, 100), [100, 83]);
        assert_eq!(spread(&[], 17, 100), Vec::<i32>::new());
    }

    #[test]
    fn every_colour_that_changes_with_the_page_is_used_as_it_is_written_in_the_rules() {
        let axis = |label: &str| Axis {
            label: label.to_owned(),
            from: 0.0,
            to: 1.0,
            ticks: vec![0.0, 1.0],
            log: false,
            show: |value| format!("{value}"),
        };
        let one = Series {
            name: "auto".to_owned(),
            color: BLUE,
            points: vec![(0.0, 0.5), (1.0, 0.7)],
            dashed: false,
            mark: None,
        };
        let svg = lines("A title", &axis("across"), &axis("up"), &[one]).unwrap();
        let (rules, drawn) = svg.split_once("</style>").unwrap();
        for (RGBColor(r, g, b), _) in DARK {
            let color = format!("#{r:02X}{g:02X}{b:02X}");
            assert!(rules.contains(&color) && drawn.contains(&format!("\"{color}\"")), "{color}");
        }
        for words in ["A title", "across", "up", "auto"] {
            assert!(drawn.contains(words), "{words}");
        }
    }
}
