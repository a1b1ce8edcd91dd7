//! What clients of `bitnet serve` do with their connections: nonsense, leaving early, and sending ahead.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Place;
use crate::serve::{Server, sampled};

/// What comes back for these bytes, until the server closes the connection or nothing comes for a second.
fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    // The server may close first.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn hostile_bytes_get_an_answer_or_a_closed_connection() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    for (bytes, begins) in [
        (&b"\0\xff\xfe garbage\r\n\r\n"[..], "HTTP/1.1 400"),
        (b"GET / HTTP/9.9\r\n\r\n", ""),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP/1.1 404"),
        (b"GET /%2e%2e/secret HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP/1.1 404"),
        (b"GET /v1/models HTTP/1.1\r\nHost: rebound.example.org\r\n\r\n", "HTTP/1.1 403"),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", "HTTP/1.1 403"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", "HTTP/1.1 400"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\nContent-Type: application/json\r\n\r\n",
            "HTTP/1.1 413",
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Type: application/json\r\n\r\n\xff\xfe\xfd\xfc\xfb",
            "HTTP/1.1 400",
        ),
    ] {
        let answer = raw(&server, bytes);
        assert!(answer.starts_with(begins), "{:?}: {answer}", String::from_utf8_lossy(bytes));
    }
    let long = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(1 << 20));
    assert!(!raw(&server, long.as_bytes()).starts_with("HTTP/1.1 200"));
    // Many connections that say nothing do not keep others from being answered.
    let idle: Vec<_> = (0..200).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
    assert_eq!(server.get("/health").0, 200);
    drop(idle);
    // Clients that leave in the middle of an answer free their place.
    for _ in 0..20 {
        let body = json!({ "prompt": "Hello", "max_tokens": 100_000, "stream": true, "temperature": 0 });
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(&post_bytes("/v1/completions", &body)).unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
    }
    let answer = server.ok("/v1/completions", &sampled("Hello"));
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
    let idle = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        server.get("/metrics").1.contains("bitnet_running_requests{model=\"model\"} 0")
    });
    assert!(idle, "requests of clients that left go on:\n{}", server.get("/metrics").1);
}

#[test]
fn metrics_are_prometheus_s() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    server.ok("/v1/completions", &sampled("Hello"));
    let (status, text) = server.get("/metrics");
    assert_eq!(status, 200);
    for line in [
        "# TYPE bitnet_requests counter",
        "bitnet_requests_total{model=\"model\",outcome=\"Finished\"} 1",
        "bitnet_generated_tokens_total{model=\"model\"} 24",
        "# TYPE bitnet_first_token_seconds histogram",
        "bitnet_first_token_seconds_count{model=\"model\"} 1",
        "bitnet_token_seconds_count{model=\"model\"} 23",
        "bitnet_running_requests{model=\"model\"} 0",
        "bitnet_fallbacks_total 0",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(text.contains("bitnet_kernel_calls_total{kernel=\""), "{text}");
    // Each metric is described once.
    let types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    assert!(types.iter().enumerate().all(|(i, line)| !types[..i].contains(line)), "{text}");
}

/// A request's bytes.
fn post_bytes(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length:";
    format!("POST {path} HTTP/1.1\r\n{head} {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[test]
fn a_client_that_leaves_while_more_of_its_bytes_wait_frees_its_place() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf", "--parallel", "1", "--queue", "1000"]);
    // Minutes of work.
    let body = json!({ "prompt": vec!["Hello"; 60], "n": 16, "max_tokens": 500, "temperature": 0, "logit_bias": { "510": -100, "511": -100 } });
    let gauge = |name: &str| -> u64 {
        let line = format!("bitnet_{name}{{model=\"model\"}} ");
        let (_, metrics) = server.get("/metrics");
        metrics.lines().find_map(|found| found.strip_prefix(&line)).map_or(0, |value| value.parse().unwrap())
    };
    let soon = |done: &dyn Fn() -> bool| {
        (0..300).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            done()
        })
    };
    for behind in [&b""[..], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let before = gauge("cancelled_requests_total");
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(&[&post_bytes("/v1/completions", &body)[..], behind].concat()).unwrap();
        assert!(
            soon(&|| gauge("running_requests") == 1 && gauge("waiting_requests") > 100),
            "it never began"
        );
        drop(stream);
        assert!(soon(&|| gauge("running_requests") + gauge("waiting_requests") == 0), "it goes on");
        assert!(gauge("cancelled_requests_total") > before + 100);
    }
    // Pipelined requests of a client that stays are answered, in order.
    let mut one = sampled("Hello");
    one["max_tokens"] = json!(2);
    let both = [post_bytes("/v1/completions", &one), post_bytes("/tokenize", &json!({ "content": "Hi" }))];
    let answers = raw(&server, &both.concat());
    let (first, second) = (answers.find("text_completion").unwrap(), answers.find("\"tokens\"").unwrap());
    assert!(first < second && answers.matches("HTTP/1.1 200").count() == 2, "{answers}");
}
