inspector(document.querySelector(".inspector"), JSON.parse(document.querySelector("#data").textContent));
