//! The program on a GPU through wgpu, or on what stands in for one (lavapipe). Without an adapter this fails: whoever builds
//! the feature wants it tested.

use serde_json::Value;

use super::Place;

fn spread(of: &Value) -> [f64; 3] {
    let [min, median, max] =
        ["min", "median", "max"].map(|part| of[part].as_f64().unwrap_or_else(|| panic!("{of}")));
    assert!(0.0 < min && min <= median && median <= max, "{of}");
    [min, median, max]
}

#[test]
fn the_suite_measures_a_gpu_in_one_run() {
    let place = Place::new();
    let call = ["bench", "--gpu-suite", "--quick", "--device", "wgpu:0", "--threads", "1"];
    let report = place.json(&[&call[..], &["--json"]].concat());
    let suite = &report["gpu_suite"];
    let read = suite["read_gb_per_s"].as_f64().unwrap() * 1e9;
    assert!(read > 0.0, "{suite}");
    let matmuls = suite["matmuls"].as_array().unwrap();
    let number = |of: &Value, key: &str| of[key].as_u64().unwrap();
    let mut shapes = Vec::new();
    for matmul in matmuls {
        assert!(matmul["problem"].is_null(), "{matmul}");
        let [_, median, _] = spread(&matmul["seconds"]);
        let fraction = matmul["fraction_of_bandwidth"].as_f64().unwrap();
        let expected = number(matmul, "weight_bytes") as f64 / median / read;
        assert!((fraction / expected - 1.0).abs() < 1e-9, "{matmul}: {expected}");
        shapes.push(["m", "n", "k"].map(|key| number(matmul, key)));
    }
    let kernels = |m: u64| {
        let of = matmuls.iter().filter(|matmul| number(matmul, "m") == m);
        of.map(|matmul| matmul["kernel"].as_str().unwrap()).collect::<Vec<_>>()
    };
    // Those for decode and those for prompts, each on every matrix of a layer of this model.
    assert_eq!(kernels(1).iter().filter(|name| **name == "cube/gemv-1").count(), 4, "{matmuls:?}");
    assert_eq!(kernels(17).iter().filter(|name| **name == "cube/gemm-64x64").count(), 4, "{matmuls:?}");
    assert_eq!(number(suite, "kernels_right"), matmuls.len() as u64);
    assert_eq!(number(suite, "outputs_compared"), shapes.iter().map(|[m, n, _]| m * n).sum::<u64>());
    shapes.dedup();
    let of_tiny = [[128, 256], [256, 256], [256, 640], [640, 256]];
    let expected: Vec<_> = [1, 17].iter().flat_map(|&m| of_tiny.map(|[n, k]| [m, n, k])).collect();
    assert_eq!(shapes, expected);

    let operations = suite["operations"].as_array().unwrap();
    assert_eq!(operations.len(), 4 * 2);
    assert_eq!(operations[0]["n"], serde_json::json!([256, 128, 128]));
    for rate in operations
        .iter()
        .map(|of| &of["seconds"])
        .chain(["quantise", "pack"].map(|key| &suite[key]["elements_per_s"]))
    {
        spread(rate);
    }
    // The whole model, of random weights, since none was named.
    for rate in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        spread(&report[rate]);
    }
    let sequences: Vec<_> =
        (report["decode_by_batch"].as_array().unwrap().iter()).map(|b| &b["sequences"]).collect();
    assert_eq!((sequences, &report["device"]), (vec![&Value::from(1), &Value::from(3)], &"wgpu:0".into()));
    let usage = &report["device_usage"][0];
    assert_eq!(usage["device"], "wgpu:0");
    let [used, reserved] = ["in_use_bytes", "reserved_bytes"].map(|key| number(usage, key));
    // The model's weights at least, and what CubeCL took for them.
    let weights = number(&report["memory"][0], "weights");
    assert!(weights <= used && used <= reserved, "{usage}, {weights}");
    let fragmentation = usage["fragmentation"].as_f64().unwrap();
    assert!((fragmentation - (1.0 - used as f64 / reserved as f64)).abs() < 1e-9, "{usage}");
    // What it reached is the device's figure, not the host's.
    assert!(report["decode_fraction_of_bandwidth"].is_null());
    assert!(suite["decode_fraction_of_bandwidth"].as_f64().unwrap() > 0.0);

    for wrong in [&["--device", "flex"][..], &["--device", "auto"], &["--device", "wgpu:0=1,flex"], &[]] {
        let error = place.error(&[&["bench", "--gpu-suite", "--quick"], wrong].concat());
        assert!(error.contains("--gpu-suite measures one GPU"), "{wrong:?}: {error}");
    }
}
