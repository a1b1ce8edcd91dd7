//! Dates, as Python's `strftime` writes them.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::Error;

use super::values::error;

/// Python's `strftime` for the codes that templates use. The time is UTC: there is no time zone data here.
pub fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    // 1 January 1970 was a Thursday.
    let weekday = DAYS[(days as usize + 3) % 7];
    let month_name = MONTHS[month as usize - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        // As the C library does on Linux: without zeros or blanks before the number.
        let bare = code == Some('-');
        if bare {
            code = chars.next();
        }
        let text: String = match code {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{:02}", second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('z') => "+0000".into(),
            Some('Z') => "UTC".into(),
            Some('%') => "%".into(),
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: the code %{code} is not supported");
                return Err(error(message));
            }
        };
        out.push_str(if bare { text.trim_start_matches(['0', ' ']) } else { &text });
    }
    Ok(out)
}

/// Year, month and day of the days since 1 January 1970 (Howard Hinnant, "chrono-compatible low-level date
/// algorithms": years begin in March, so that the leap day comes last).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_date() {
        // date -u -d @1721910896
        let text = |format: &str| strftime(format, UNIX_EPOCH + Duration::from_secs(1_721_910_896));
        assert_eq!(text("%d %b %Y").unwrap(), "25 Jul 2024");
        assert_eq!(
            text("%A %B %e, %H:%M:%S %p %I %F %T %y%%").unwrap(),
            "Thursday July 25, 12:34:56 PM 12 2024-07-25 12:34:56 24%"
        );
        assert!(text("%Q").unwrap_err().to_string().contains("%Q"));
        assert!(text("%").is_err());
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(19_783), (2024, 3, 1));
        // The end of the clock's range.
        assert!(strftime("%F", UNIX_EPOCH + Duration::from_secs(i64::MAX as u64)).is_ok());
    }
}
