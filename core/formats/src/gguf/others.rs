//! Tensor types that other programs write and nothing here reads: their names, and what to do about them.

/// Types of llama.cpp (`ggml.h`).
const LLAMA_CPP: [(u32, &str); 23] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (39, "TL2 of bitnet.cpp, or MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// Types of bitnet.cpp, in the order of one machine's kernels.
const BITNET_CPP: [(u32, &str); 2] = [(37, "I8_S of bitnet.cpp"), (38, "TL1 of bitnet.cpp")];

/// Types that stand beside ternary ones in ik_llama.cpp's files. `_R4` and `_R8` have the
/// rows interleaved by four and eight.
const IK_LLAMA_CPP: [(u32, &str); 22] = [
    (133, "Q6_0 of ik_llama.cpp"),
    (137, "IQ2_K of ik_llama.cpp"),
    (138, "IQ3_K of ik_llama.cpp"),
    (139, "IQ4_K of ik_llama.cpp"),
    (202, "Q4_0_R8 of ik_llama.cpp"),
    (206, "Q5_0_R4 of ik_llama.cpp"),
    (208, "Q8_0_R8 of ik_llama.cpp"),
    (210, "Q2_K_R4 of ik_llama.cpp"),
    (211, "Q3_K_R4 of ik_llama.cpp"),
    (212, "Q4_K_R4 of ik_llama.cpp"),
    (213, "Q5_K_R4 of ik_llama.cpp"),
    (214, "Q6_K_R4 of ik_llama.cpp"),
    (220, "IQ4_NL_R4 of ik_llama.cpp"),
    (223, "IQ4_XS_R8 of ik_llama.cpp"),
    (230, "BF16_R16 of ik_llama.cpp"),
    (233, "Q6_0_R4 of ik_llama.cpp"),
    (335, "IQ2_BN_R4 of ik_llama.cpp"),
    (337, "IQ2_K_R4 of ik_llama.cpp"),
    (338, "IQ3_K_R4 of ik_llama.cpp"),
    (339, "IQ4_K_R4 of ik_llama.cpp"),
    (398, "Q8_KV_R8 of ik_llama.cpp"),
    (399, "Q8_K_R8 of ik_llama.cpp"),
];

fn find(types: &[(u32, &'static str)], id: u32) -> Option<&'static str> {
    types.iter().find(|(number, _)| *number == id).map(|(_, name)| *name)
}

/// The name of a type that is not read, with its program where that is not llama.cpp.
pub(super) fn name(id: u32) -> Option<&'static str> {
    [&LLAMA_CPP[..], &BITNET_CPP, &IK_LLAMA_CPP].into_iter().find_map(|types| find(types, id))
}

/// What to do about a tensor of this type and name; begins with punctuation, or is empty.
pub(super) fn help(id: u32, tensor: &str) -> &'static str {
    match id {
        // The quantisations that llama-quantize chooses for the embedding or the head of a ternary file.
        10 | 11 | 23 if matches!(tensor, "token_embd.weight" | "output.weight") => {
            "; llama-quantize gives embedding and output head such a type unless it is told another: make the \
             file again with --token-embedding-type q6_k --output-tensor-type q6_k"
        }
        10 | 11 | 16..=23 | 29 => "; only models with ternary projections are read",
        // How the weights lie depends on constants that bitnet.cpp computes for a machine and compiles into its kernels.
        37..=39 => {
            "; bitnet.cpp orders such weights for the kernels of one machine, and the file does not say how: make it again \
             with `python setup_env.py -md MODEL -q i2_s`, or convert the directory that it was made from: \
             `bitnet convert DIRECTORY --to gguf`"
        }
        335 => {
            "; its rows are interleaved: make the file again as iq2_bn, without --repack, or take the file that it was made \
             from"
        }
        _ if find(&IK_LLAMA_CPP, id).is_some() => {
            "; only ik_llama.cpp reads such a file: take the file or directory that it was made from"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::super::TensorType;
    use super::*;

    #[test]
    fn numbers_are_unique_and_of_no_type_that_is_read() {
        let all: Vec<_> = [&LLAMA_CPP[..], &BITNET_CPP, &IK_LLAMA_CPP].concat();
        for (i, (id, name)) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|(other, named)| other != id && named != name), "{name} ({id})");
            assert_eq!(TensorType::from_id(*id), None, "{name}");
        }
    }

    #[test]
    fn what_ternary_files_of_others_hold_is_named() {
        let (embedding, projection) = ("token_embd.weight", "blk.0.attn_q.weight");
        for (id, tensor, name, advice) in [
            (10, embedding, "Q2_K (10)", "--token-embedding-type q6_k"),
            (11, "output.weight", "Q3_K (11)", "--token-embedding-type q6_k"),
            (23, embedding, "IQ4_XS (23)", "--token-embedding-type q6_k"),
            (10, projection, "Q2_K (10)", "ternary projections"),
            (38, projection, "TL1 of bitnet.cpp (38)", "setup_env.py -md MODEL -q i2_s"),
            (39, projection, "TL2 of bitnet.cpp, or MXFP4 (39)", "bitnet convert DIRECTORY --to gguf"),
            (41, projection, "Q1_0 (41)", ""),
            (137, projection, "IQ2_K of ik_llama.cpp (137)", "made from"),
            (335, projection, "IQ2_BN_R4 of ik_llama.cpp (335)", "as iq2_bn, without --repack"),
            (398, projection, "Q8_KV_R8 of ik_llama.cpp (398)", "made from"),
            (4711, projection, "4711 (unknown)", ""),
        ] {
            assert_eq!(TensorType::describe(id), name);
            let help = help(id, tensor);
            assert!(help.contains(advice) && help.is_empty() == advice.is_empty(), "{name}: {help:?}");
        }
    }
}
