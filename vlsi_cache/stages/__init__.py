"""The stages, one file each: plan, verbalize, build, distill (verbalize, interact, sft), evaluate."""
