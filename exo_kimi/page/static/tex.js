// TeX formulas as MathML, which browsers draw themselves. What is not known here is shown as it was written.

const SPACE = "http://www.w3.org/1998/Math/MathML";
const MOST_DEPTH = 40;

function m(tag, attributes, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const LETTERS = Object.fromEntries(
  ("alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν xi ξ pi π varpi ϖ rho ρ " +
    "sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω " +
    "infty ∞ partial ∂ nabla ∇ hbar ℏ ell ℓ emptyset ∅ varnothing ∅ aleph ℵ Re ℜ Im ℑ angle ∠ triangle △ degree ° prime ′ dots … ldots … cdots ⋯ vdots ⋮ ddots ⋱ top ⊤ bot ⊥ square □ checkmark ✓")
    .split(" ")
    .reduce((pairs, word, index, all) => (index % 2 ? pairs : [...pairs, [word, all[index + 1]]]), []),
);
const OPERATORS = Object.fromEntries(
  ("times × cdot ⋅ div ÷ pm ± mp ∓ ast ∗ star ⋆ circ ∘ bullet • oplus ⊕ ominus ⊖ otimes ⊗ odot ⊙ le ≤ leq ≤ ge ≥ geq ≥ ne ≠ neq ≠ equiv ≡ approx ≈ sim ∼ simeq ≃ cong ≅ propto ∝ ll ≪ gg ≫ " +
    "in ∈ notin ∉ ni ∋ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ cup ∪ cap ∩ setminus ∖ land ∧ wedge ∧ lor ∨ vee ∨ lnot ¬ neg ¬ forall ∀ exists ∃ nexists ∄ to → rightarrow → leftarrow ← " +
    "leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ implies ⟹ iff ⟺ mapsto ↦ uparrow ↑ downarrow ↓ longrightarrow ⟶ hookrightarrow ↪ perp ⊥ parallel ∥ mid ∣ nmid ∤ models ⊨ vdash ⊢ therefore ∴ because ∵ " +
    "lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ langle ⟨ rangle ⟩ vert | Vert ‖ lvert | rvert | lVert ‖ rVert ‖ lbrace { rbrace } colon :")
    .split(" ")
    .reduce((pairs, word, index, all) => (index % 2 ? pairs : [...pairs, [word, all[index + 1]]]), []),
);
const LARGE = { sum: "∑", prod: "∏", coprod: "∐", int: "∫", iint: "∬", iiint: "∭", oint: "∮", bigcup: "⋃", bigcap: "⋂", bigoplus: "⨁", bigotimes: "⨂", bigvee: "⋁", bigwedge: "⋀" };
const FUNCTIONS = new Set("arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf limsup ln log max min Pr sec sin sinh sup tan tanh argmax argmin".split(" "));
const LIMITS = new Set("lim liminf limsup max min sup inf gcd Pr det argmax argmin".split(" "));
const ACCENTS = { hat: "^", widehat: "^", tilde: "~", widetilde: "~", bar: "¯", overline: "¯", vec: "→", dot: "˙", ddot: "¨", check: "ˇ", breve: "˘", overrightarrow: "→", overbrace: "⏞" };
const UNDERS = { underline: "_", underbrace: "⏟" };
const VARIANTS = { mathbb: [0x1d538, 0x1d552, 0x1d7d8], mathbf: [0x1d400, 0x1d41a, 0x1d7ce], mathcal: [0x1d49c, 0x1d4b6, null], mathfrak: [0x1d504, 0x1d51e, null], mathscr: [0x1d49c, 0x1d4b6, null], boldsymbol: [0x1d400, 0x1d41a, 0x1d7ce], bm: [0x1d400, 0x1d41a, 0x1d7ce] };
// Letters that Unicode had before it had the alphabets.
const HOLES = { "𝔺": "ℂ", "𝔿": "ℍ", "𝕅": "ℕ", "𝕇": "ℙ", "𝕈": "ℚ", "𝕉": "ℝ", "𝕑": "ℤ", "𝒝": "ℬ", "𝒠": "ℰ", "𝒡": "ℱ", "𝒣": "ℋ", "𝒤": "ℐ", "𝒧": "ℒ", "𝒨": "ℳ", "𝒭": "ℛ", "𝔆": "ℭ", "𝔌": "ℌ", "𝔍": "ℑ", "𝔕": "ℜ", "𝔝": "ℨ", "𝒺": "ℯ", "𝒼": "ℊ", "𝓄": "ℴ" };
const SPACES = { ",": "0.17em", ":": "0.22em", ";": "0.28em", "!": "-0.17em", " ": "0.25em", quad: "1em", qquad: "2em", enspace: "0.5em", thinspace: "0.17em" };
const IGNORED = new Set(["limits", "nolimits", "displaystyle", "textstyle", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "Biggl", "Biggr", "nonumber", "notag"]);
const FENCED = { matrix: ["", ""], pmatrix: ["(", ")"], bmatrix: ["[", "]"], Bmatrix: ["{", "}"], vmatrix: ["|", "|"], Vmatrix: ["‖", "‖"], cases: ["{", ""], aligned: ["", ""], align: ["", ""], "align*": ["", ""], split: ["", ""], gathered: ["", ""], array: ["", ""], smallmatrix: ["", ""] };

class Unknown extends Error {}

/** A formula as an element: MathML, or the source as code where it has something that is not known here. */
export function math(source, display) {
  try {
    const reader = new Reader(source);
    const row = reader.row(() => false);
    if (reader.at < reader.tokens.length) throw new Unknown(source);
    return m("math", { display: display ? "block" : "inline" }, row);
  } catch (error) {
    if (!(error instanceof Unknown)) throw error;
    const code = document.createElement("code");
    code.className = "tex";
    code.textContent = display ? `$$${source}$$` : `$${source}$`;
    return code;
  }
}

class Reader {
  constructor(source) {
    this.tokens = source.match(/\\[A-Za-z]+\*?|\\[\s\S]|\s+|[\s\S]/gu) ?? [];
    this.at = 0;
    this.depth = 0;
  }

  peek() {
    while (this.at < this.tokens.length && /^\s+$/.test(this.tokens[this.at])) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new Unknown("the end");
    this.at += 1;
    return token;
  }

  /** Items up to the end or to a token for which `ends` is true, as one element. */
  row(ends) {
    if ((this.depth += 1) > MOST_DEPTH) throw new Unknown("depth");
    const items = [];
    for (let token = this.peek(); token !== undefined && token !== "}" && !ends(token); token = this.peek()) {
      const item = this.scripted();
      if (item !== null) items.push(item);
    }
    this.depth -= 1;
    return items.length === 1 ? items[0] : m("mrow", {}, ...items);
  }

  scripted() {
    const first = this.peek();
    const base = first === "_" || first === "^" ? m("mrow", {}) : this.atom();
    let under = null;
    let over = null;
    for (let token = this.peek(); token === "_" || token === "^" || token === "'" || token === "\\limits" || token === "\\nolimits"; token = this.peek()) {
      this.at += 1;
      if (token === "_") under = this.argument();
      else if (token === "^") over = this.argument();
      else if (token === "'") {
        let primes = "′";
        while (this.peek() === "'") {
          this.at += 1;
          primes += "′";
        }
        over = m("mo", {}, primes);
      }
    }
    if (base === null || (under === null && over === null)) return base;
    const limits = base.limits === true;
    if (under !== null && over !== null) return m(limits ? "munderover" : "msubsup", {}, base, under, over);
    if (under !== null) return m(limits ? "munder" : "msub", {}, base, under);
    return m(limits ? "mover" : "msup", {}, base, over);
  }

  /** `{...}` or one item. */
  argument() {
    if (this.peek() !== "{") {
      const item = this.atom();
      if (item === null) throw new Unknown("nothing");
      return item;
    }
    return this.group();
  }

  group() {
    this.next();
    const row = this.row(() => false);
    if (this.next() !== "}") throw new Unknown("}");
    return row;
  }

  /** The characters in `{...}` as they are. */
  text() {
    if (this.next() !== "{") throw new Unknown("{");
    let text = "";
    for (let open = 1; ; this.at += 1) {
      const token = this.tokens[this.at];
      if (token === undefined) throw new Unknown("the end");
      open += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (open === 0) break;
      if (token !== "{" && token !== "}") text += /^\\[^A-Za-z]$/.test(token) ? token.slice(1) : token;
    }
    this.at += 1;
    return text;
  }

  atom() {
    const token = this.next();
    if (token === "{") {
      this.at -= 1;
      return this.group();
    }
    if (/^[0-9]$/.test(token)) {
      let digits = token;
      while (/^[0-9.]$/.test(this.tokens[this.at] ?? "") && !(this.tokens[this.at] === "." && !/^[0-9]$/.test(this.tokens[this.at + 1] ?? ""))) digits += this.tokens[this.at++];
      return m("mn", {}, digits);
    }
    if (/^\p{L}$/u.test(token)) return m("mi", {}, token);
    if (token === "~") return m("mspace", { width: "0.25em" });
    if (token === "&" || token === "}" || token === "#" || token === "%") throw new Unknown(token);
    if (!token.startsWith("\\")) return m("mo", /^[()[\]|]$/.test(token) ? { stretchy: "false" } : {}, token === "-" ? "−" : token === "*" ? "∗" : token);
    return this.command(token.slice(1));
  }

  command(name) {
    if (name in LETTERS) return m("mi", {}, LETTERS[name]);
    if (name in OPERATORS) return m("mo", /[⌊⌋⌈⌉⟨⟩|‖{}]/.test(OPERATORS[name]) ? { stretchy: "false" } : {}, OPERATORS[name]);
    if (name in LARGE) return Object.assign(m("mo", { largeop: "true", movablelimits: "true" }, LARGE[name]), { limits: !name.endsWith("int") });
    if (FUNCTIONS.has(name)) return Object.assign(m("mi", {}, name), { limits: LIMITS.has(name) });
    if (name in SPACES) return m("mspace", { width: SPACES[name] });
    if (IGNORED.has(name)) return null;
    if (name in ACCENTS) return m("mover", { accent: "true" }, this.argument(), m("mo", { stretchy: /wide|over/.test(name) ? "true" : "false" }, ACCENTS[name]));
    if (name in UNDERS) return Object.assign(m("munder", {}, this.argument(), m("mo", {}, UNDERS[name])), { limits: true });
    if (name in VARIANTS) return this.variant(name);
    if (/^[{}%#&$_|]$/.test(name)) return m("mo", { stretchy: "false" }, name === "|" ? "‖" : name);
    switch (name) {
      case "frac":
      case "dfrac":
      case "tfrac":
        return m("mfrac", {}, this.argument(), this.argument());
      case "binom":
      case "dbinom":
        return m("mrow", {}, m("mo", {}, "("), m("mfrac", { linethickness: "0" }, this.argument(), this.argument()), m("mo", {}, ")"));
      case "sqrt": {
        if (this.peek() !== "[") return m("msqrt", {}, this.argument());
        this.at += 1;
        const index = this.row((token) => token === "]");
        this.next();
        return m("mroot", {}, this.argument(), index);
      }
      case "text":
      case "textbf":
      case "textit":
      case "textrm":
      case "mbox":
        return m("mtext", {}, this.text().replace(/^ | $/g, "\u00a0"));
      case "mathrm":
      case "operatorname":
      case "operatorname*":
      case "mathsf":
      case "mathtt":
      case "mathit":
        return m("mi", { mathvariant: "normal" }, this.text());
      case "left":
        return this.fenced();
      case "begin":
        return this.table(this.text());
      case "overset":
      case "stackrel": {
        const over = this.argument();
        return m("mover", {}, this.argument(), over);
      }
      case "underset": {
        const under = this.argument();
        return m("munder", {}, this.argument(), under);
      }
      case "boxed":
        return m("mrow", { class: "boxed" }, this.argument());
      case "pmod":
        return m("mrow", {}, m("mspace", { width: "0.5em" }), m("mo", {}, "("), m("mi", {}, "mod"), m("mspace", { width: "0.3em" }), this.argument(), m("mo", {}, ")"));
      case "bmod":
        return m("mo", {}, "mod");
      case "not":
        return m("mo", {}, `${this.atom().textContent}\u0338`);
      default:
        throw new Unknown(name);
    }
  }

  variant(name) {
    const [upper, lower, digit] = VARIANTS[name];
    const text = this.peek() === "{" ? this.text() : this.next();
    if (!/^[A-Za-z0-9]+$/.test(text)) {
      if (/^\\[A-Za-z]+$/.test(text.trim()) && text.trim().slice(1) in LETTERS) return m("mi", {}, LETTERS[text.trim().slice(1)]);
      throw new Unknown(name);
    }
    const letters = [...text].map((letter) => {
      const code = letter.charCodeAt(0);
      const base = code < 58 ? (digit ?? 48) - 48 : code < 91 ? upper - 65 : lower - 97;
      const found = String.fromCodePoint(base + code);
      return HOLES[found] ?? found;
    });
    return m("mi", {}, letters.join(""));
  }

  fenced() {
    const open = this.fence();
    const parts = [];
    for (;;) {
      parts.push(this.row((token) => token === "\\right" || token === "\\middle"));
      const token = this.next();
      if (token === "}") throw new Unknown("}");
      const mark = this.fence();
      if (token === "\\right") return m("mrow", {}, ...(open ? [m("mo", { fence: "true" }, open)] : []), ...parts, ...(mark ? [m("mo", { fence: "true" }, mark)] : []));
      parts.push(m("mo", { fence: "true" }, mark));
    }
  }

  fence() {
    const token = this.next();
    if (token === ".") return "";
    if (/^[()[\]|/<>]$/.test(token)) return { "<": "⟨", ">": "⟩" }[token] ?? token;
    const name = token.slice(1);
    if (name === "{" || name === "}") return name;
    if (name === "|") return "‖";
    if (name in OPERATORS) return OPERATORS[name];
    throw new Unknown(token);
  }

  table(name) {
    if (!(name in FENCED)) throw new Unknown(name);
    if (name === "array" && this.peek() === "{") this.text();
    const [open, close] = FENCED[name];
    const rows = [[]];
    for (;;) {
      rows[rows.length - 1].push(this.row((token) => token === "&" || token === "\\\\" || token === "\\end"));
      const token = this.next();
      if (token === "\\\\") rows.push([]);
      else if (token === "\\end") break;
      else if (token !== "&") throw new Unknown(token);
    }
    if (this.text() !== name) throw new Unknown("end");
    if (rows.length > 1 && rows[rows.length - 1].length === 1 && rows[rows.length - 1][0].childNodes.length === 0) rows.pop();
    const side = /align|split|cases/.test(name) ? "left" : "center";
    const body = m("mtable", { class: `side-${side}` }, ...rows.map((row) => m("mtr", {}, ...row.map((cell) => m("mtd", {}, cell)))));
    if (!open && !close) return body;
    return m("mrow", {}, ...(open ? [m("mo", { fence: "true" }, open)] : []), body, ...(close ? [m("mo", { fence: "true" }, close)] : []));
  }
}
